"""Two runs side by side: what they measured, what differs on the rows that both answered, what differs in how they ran."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import ValidationError

from cache2cache.errors import DataError
from cache2cache.evaluate import folder
from cache2cache.evaluate.report import numbers
from cache2cache.evaluate.report.markdown import escape, markdown_table
from cache2cache.evaluate.report.numbers import MISSING, Scale, scale_of
from cache2cache.evaluate.report.order import ordered
from cache2cache.evaluate.report.rows import Key, by_key
from cache2cache.evaluate.report.tables import Table, as_text, flattened
from cache2cache.evaluate.rowfile import read_records
from cache2cache.evaluate.schema import Estimate, Report, RowRecord, TaskSummary

if TYPE_CHECKING:
    from rich.console import Console

REPORT = "report.json"
_OUTCOMES = ("commands", "definitions", "started", "seconds", "peak_memory_bytes")
"""What a run says of itself that differs between any two runs, or that other settings say as well."""


@dataclass(frozen=True)
class Compared:
    """One metric of one system on one task."""

    task: str
    """Its title."""
    system: str
    scale: Scale
    a: Estimate | None
    """None if the run has no such number."""
    b: Estimate | None
    difference: Estimate | None = None
    """Mean of b − a over the rows that both runs answered; None if there are none."""
    p: float | None = None
    """McNemar's; None for metrics that are not 0 or 1."""
    only_a: int | None = None
    """Rows that only run a gets right."""
    only_b: int | None = None


@dataclass(frozen=True)
class Comparison:
    """Two runs."""

    a: Path
    b: Path
    settings: tuple[tuple[str, str, str], ...]
    """Setting, what it is in a, what it is in b; only where they differ."""
    compared: tuple[Compared, ...]
    unlike: tuple[tuple[str, int], ...] = ()
    """Task → how many of its rows have one id in both runs but ask something else; only where there are any."""

    @property
    def notes(self) -> list[str]:
        """What a reader of the differences has to know."""
        return [
            f"{task}: {count} row{'s' * (count > 1)} of the same id ask something else in b, and are in no difference"
            for task, count in self.unlike
        ]


def compare(a: Path, b: Path) -> Comparison:
    """Compare the folders of two runs.

    Rows are the same if task, id, system, question and right answer are. An error counts as wrong, and where less is better the
    row is left out of the difference, since nothing was measured.

    Raises:
        DataError: a folder without report.json or rows.jsonl, or with ones that are damaged.
    """
    reports, answers = zip(*map(_read, (a, b)), strict=True)
    unlike = Counter(
        task for task, _ in {key[:2] for key in answers[0].keys() & answers[1] if not _same(*(x[key] for x in answers))}
    )
    return Comparison(a, b, tuple(_settings(*reports)), tuple(_compared(reports, answers)), tuple(unlike.items()))


def comparison_tables(comparison: Comparison) -> list[Table]:
    """The settings that differ, and one table per task and metric."""
    columns = ("system", "a", "b", "b − a", "p", "only a", "only b", "rows")
    found = [Table("Settings that differ", ("setting", "a", "b"), comparison.settings, numeric=False)]
    for heading in dict.fromkeys(map(_heading, comparison.compared)):
        rows = [_cells(one) for one in comparison.compared if _heading(one) == heading]
        found.append(Table(heading, columns, tuple(rows)))
    return [table for table in found if table.rows]


def print_comparison(comparison: Comparison, console: Console) -> None:
    """Print all tables. Made for 120 columns."""
    from rich.text import Text

    from cache2cache.evaluate.report.table import plain_table

    console.print(Text(f"a  {comparison.a}\nb  {comparison.b}\n"))
    for note in comparison.notes:
        console.print(Text(f"{note}\n", style="yellow"))
    for table in comparison_tables(comparison):
        shown = plain_table()
        for number, column in enumerate(table.columns):
            right = table.numeric and number > 0
            shown.add_column(
                Text(column), justify="right" if right else "left", overflow="fold", no_wrap=right, min_width=3
            )
        for row in table.rows:
            shown.add_row(*map(Text, row))
        console.print(Text(table.title, style="bold"))
        console.print(shown, "")


def comparison_markdown(comparison: Comparison) -> str:
    """All tables in GitHub Markdown."""
    blocks = ["# Two runs", f"- a: {escape(str(comparison.a))}\n- b: {escape(str(comparison.b))}"]
    blocks += map(escape, comparison.notes)
    for table in comparison_tables(comparison):
        blocks += [f"## {escape(table.title)}", markdown_table(table)]
    return "\n\n".join(blocks) + "\n"


def _read(run: Path) -> tuple[Report, dict[Key, RowRecord]]:
    for name in (REPORT, folder.ROWS):
        if not (run / name).is_file():
            raise DataError(
                f"the folder holds no {name}", got=run, allowed="the --out of a finished `c2c eval`",
                hint="Run it to its end first",
            )  # fmt: skip
    try:
        report = Report.model_validate_json((run / REPORT).read_bytes())
    except ValidationError as error:
        found = error.errors()[0]
        where = ".".join(map(str, found["loc"])) or "the file"
        raise DataError(f"{run / REPORT} is no report of this version", got=f"{where}: {found['msg']}") from error
    return report, by_key(read_records(run / folder.ROWS, RowRecord))


def _settings(a: Report, b: Report) -> Iterator[tuple[str, str, str]]:
    first, second = (flattened({k: v for k, v in one.run.items() if k not in _OUTCOMES}) for one in (a, b))
    for key in dict.fromkeys([*first, *second]):
        values = [as_text(run[key]) if key in run else MISSING for run in (first, second)]
        if values[0] != values[1]:
            yield key, values[0], values[1]


def _compared(reports: tuple[Report, Report], answers: tuple[Mapping[Key, RowRecord], ...]) -> Iterator[Compared]:
    for name in dict.fromkeys([*reports[0].tasks, *reports[1].tasks]):
        both = [report.tasks.get(name) for report in reports]
        present = [task for task in both if task is not None]
        metrics = dict.fromkeys(metric for task in present for metric in numbers.metrics_of(task))
        for metric in metrics:
            scale = _scale(present, metric)
            for system in ordered({system for task in present for system in task.systems}):
                a, b = (_estimate(task, system, metric) for task in both)
                if a is not None or b is not None:
                    both_have = a is not None and b is not None
                    values = list(_same_rows(answers, name, system, scale)) if both_have else []
                    yield Compared(present[0].title, system, scale, a, b, *_paired(values, scale))


def _scale(tasks: list[TaskSummary], metric: str) -> Scale:
    """Of both runs: a share only if it is one in both."""
    scales = [scale_of(task, metric) for task in tasks]
    return Scale(metric, all(s.share for s in scales), any(s.lower_is_better for s in scales))


def _estimate(task: TaskSummary | None, system: str, metric: str) -> Estimate | None:
    found = task.systems.get(system) if task else None
    return found.metrics.get(metric) if found else None


def _same_rows(
    answers: tuple[Mapping[Key, RowRecord], ...], task: str, system: str, scale: Scale
) -> Iterator[tuple[float, float]]:
    """The metric in both runs, row by row."""
    for key, row in answers[0].items():
        other = answers[1].get(key)
        if (key[0], key[2]) == (task, system) and other is not None and _same(row, other):
            values = [_value(one, scale) for one in (row, other)]
            if values[0] is not None and values[1] is not None:
                yield values[0], values[1]


def _same(row: RowRecord, other: RowRecord) -> bool:
    return (row.target, row.asked) == (other.target, other.asked)


def _value(row: RowRecord, scale: Scale) -> float | None:
    if row.error is not None:
        return None if scale.lower_is_better else 0.0
    return row.metrics.get(scale.metric)


def _paired(
    values: list[tuple[float, float]], scale: Scale
) -> tuple[Estimate | None, float | None, int | None, int | None]:
    from cache2cache.evaluate import stats

    if not values:
        return None, None, None, None
    first, second = (list(side) for side in zip(*values, strict=True))
    difference = stats.paired(second, first, (0.0, 1.0) if scale.share else None)
    if not {*first, *second} <= {0.0, 1.0}:
        return difference, None, None, None
    p, only_a, only_b = stats.mcnemar(first, second)
    return difference, p, only_a, only_b


def _heading(one: Compared) -> str:
    return f"{one.task}: {one.scale.unit}"


def _cells(one: Compared) -> tuple[str, ...]:
    counts = (MISSING if count is None else str(count) for count in (one.only_a, one.only_b))
    return (
        one.system,
        one.scale.estimate(one.a),
        one.scale.estimate(one.b),
        one.scale.difference(one.difference),
        numbers.p_value(one.p),
        *counts,
        str(one.difference.n) if one.difference else "0",
    )
