"""A report as GitHub Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from cache2cache.evaluate.report.content import Section
from cache2cache.evaluate.report.tables import Table

_MARKS = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"} | {mark: f"\\{mark}" for mark in "\\`*_[]|$~"})


def markdown(title: str, sections: Sequence[Section]) -> str:
    """The whole file. Figures are linked as figures/NAME.png."""
    blocks = [f"# {escape(title)}"]
    for section in sections:
        blocks.append(f"## {escape(section.title)}")
        blocks += map(escape, section.text)
        if section.code:
            blocks.append(fenced(section.code))
        for table in section.tables:
            blocks += [*([f"### {escape(table.title)}"] if table.title else []), markdown_table(table)]
        blocks += [f"![{escape(d.name)}](figures/{d.name}.png)\n\n{escape(d.caption)}" for d in section.drawings]
    return "\n\n".join(blocks) + "\n"


def markdown_table(table: Table) -> str:
    """Without its title. Numbers are aligned to the right."""
    side = "---:" if table.numeric else "---"
    lines = [table.columns, ("---", *(side for _ in table.columns[1:])), *table.rows]
    return "\n".join(
        f"| {' | '.join(cell if number == 1 else escape(cell) for cell in line)} |" for number, line in enumerate(lines)
    )


def escape(text: str) -> str:
    """Text that Markdown shows as it is, on one line: no markup, no HTML, no end of a cell."""
    return " ".join(text.split()).translate(_MARKS)


def fenced(code: str) -> str:
    """A block of shell code, inside a fence longer than any that the code holds."""
    longest = max((len(run) for run in re.findall("`+", code)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}bash\n{code}\n{fence}"
