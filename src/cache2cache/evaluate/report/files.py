"""The files of a report: report.json, report.md, report.html and figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from cache2cache.evaluate.report.content import sections, title
from cache2cache.evaluate.report.figures import draw
from cache2cache.evaluate.report.html import html
from cache2cache.evaluate.report.markdown import markdown
from cache2cache.evaluate.report.samples import sample
from cache2cache.evaluate.schema import Report, RowRecord

FIGURES = "figures"


def write(report: Report, rows: Sequence[RowRecord], out: Path, questions: Mapping[tuple[str, str], str]) -> None:
    """Write report.json, report.md, report.html and figures/*.png into a folder, over those of an earlier report.

    The same report and rows give the same bytes, in whatever order the rows are. Nothing is written unless everything
    could be rendered.

    Args:
        rows: what the report was computed from.
        questions: (task, id) → the question as a person reads it.

    Raises:
        DataError: rows and report do not belong together, or a row that is shown has no question.
        MissingExtraError: matplotlib is not installed.
    """
    samples = sample(report, rows, questions)
    drawings = draw(report, rows)
    content, heading = sections(report, drawings), title(report)
    texts = {
        "report.json": report.model_dump_json(indent=1) + "\n",
        "report.md": markdown(heading, content),
        "report.html": html(report, heading, content, samples),
    }
    figures = out / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    for stale in figures.glob("*.png"):
        stale.unlink()
    for drawing in drawings:
        (figures / f"{drawing.name}.png").write_bytes(drawing.png)
    for name, text in texts.items():
        (out / name).write_text(text, encoding="utf-8", newline="\n")
