"""What a report says, as sections of plain text, tables and figures. Knows neither Markdown nor HTML."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache2cache.evaluate.report import tables
from cache2cache.evaluate.report.figures import Drawing
from cache2cache.evaluate.report.tables import Table
from cache2cache.evaluate.schema import Report


@dataclass(frozen=True)
class Section:
    """One part of a report. Its text is plain: whoever renders it escapes it."""

    title: str
    text: tuple[str, ...] = ()
    code: str | None = None
    tables: tuple[Table, ...] = ()
    drawings: tuple[Drawing, ...] = ()


def title(report: Report) -> str:
    """Receiver ← sharers."""
    return f"{_names(report.run.get('receiver'))} ← {_names(report.run.get('sharers'))}"


def sections(report: Report, drawings: Sequence[Drawing]) -> list[Section]:
    """The whole report in reading order."""
    by_name = {drawing.name: drawing for drawing in drawings}

    def drawn(*names: str) -> tuple[Drawing, ...]:
        return tuple(by_name[name] for name in names if name in by_name)

    found = [
        Section(
            "All tasks",
            (_lead(report), "Primary metrics with 95 % intervals; shares in per cent."),
            tables=(tables.overview(report),),
            drawings=drawn("accuracy", "controls"),
        )
    ]
    for name, task in report.tasks.items():
        of_task = (tables.scores(task), tables.differences(task), tables.behaviour(task), tables.costs(task))
        found.append(
            Section(
                task.title,
                tuple(transfer.sentence for transfer in task.transfer),
                tables=tuple(table for table in of_task if table.rows),
                drawings=tuple(drawing for drawing in drawings if drawing.task == name),
            )
        )
    if any(task.gap_recovered for task in report.tasks.values()):
        found.append(Section("Gap recovered", tables=(tables.gap(report),), drawings=drawn("gap_recovered")))
    if "who_is_right" in by_name:
        found.append(Section("Who is right", drawings=drawn("who_is_right")))
    if report.latency:
        found.append(
            Section(
                "Latency",
                ("One request alone, nothing reused; seconds.",),
                tables=(tables.latency(report), tables.stages(report)),
                drawings=drawn("accuracy_latency", "latency_stages"),
            )
        )
    return [
        *found,
        Section("Rows and licences", tables=(tables.tasks(report),)),
        Section("Systems", tables=(tables.definitions(report),)),
        Section("How to read this", _READING, tables=(tables.metrics(report),)),
        Section(
            "How it was run", code="\n".join(report.run.get("commands", [])) or None, tables=(tables.settings(report),)
        ),
    ]


_READING = (
    "All answers are greedy. A system that was asked fewer rows than the others has a smaller n; a difference is over the "
    "rows that both systems were asked. An error is a row and counts as wrong.",
    "Unread are answers of which nothing could be taken: no letter, no number. They count as wrong.",
    "Intervals are 95 %: Wilson's for what is right or wrong, a bootstrap of the mean for everything else, a paired "
    "bootstrap for differences, in percentage points where the metric is a share. p is McNemar's exact two-sided p. "
    "Nothing is corrected for the number of comparisons.",
    "Gap recovered is (system − receiver) / (sharer − receiver), where that gap is clearly not zero.",
    "The calibration error is the expected one of the letter likelihoods, in ten equal bins; agreement is the share of "
    "rows on which a system's likeliest letter is the sharer's.",
    "Tokens and bytes are means per row. Cache crossed is what the fusion took of the sharer's cache, text crossed what "
    "the sharer wrote to the receiver.",
)


def _lead(report: Report) -> str:
    """The run in one sentence."""
    rows = ", ".join(f"{task.rows} rows of {task.title}" for task in report.tasks.values())
    said = {"fuser": "fusers", "seed": "seed", "started": "started"}
    known = [f"{word} {_names(report.run[key])}" for word, key in said.items() if key in report.run]
    return f"{'; '.join([rows, *known])}."


def _names(value: Any) -> str:
    if isinstance(value, Mapping) and "name" in value:
        value = value["name"]
    return " + ".join(map(_names, value)) if isinstance(value, list | tuple) else str(value)
