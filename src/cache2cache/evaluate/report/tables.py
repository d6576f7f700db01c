"""The tables of a report, as rows of plain text."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cache2cache.evaluate.report import numbers
from cache2cache.evaluate.report.numbers import MISSING, SHARE, scale_of
from cache2cache.evaluate.report.order import ordered, ordered_stages
from cache2cache.evaluate.schema import Report, SystemSummary, TaskSummary
from cache2cache.evaluate.tasks.base import METRICS

_UNDEFINED = "a system that the run does not define"


@dataclass(frozen=True)
class Table:
    """Rows of text under column names. The first column names what a row is about."""

    title: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    numeric: bool = True
    """Whether all columns but the first hold numbers."""


def systems_of(report: Report) -> list[str]:
    """Every system of every task, in the order of a report."""
    return ordered({name for task in report.tasks.values() for name in task.systems})


def overview(report: Report) -> Table:
    """Systems × tasks, primary metrics."""
    columns = [f"{task.title}: {scale_of(task, task.primary).unit}" for task in report.tasks.values()]
    rows = []
    for name in systems_of(report):
        cells = [
            scale_of(task, task.primary).estimate(system.metrics.get(task.primary) if system else None)
            for task in report.tasks.values()
            for system in [task.systems.get(name)]
        ]
        rows.append((name, *cells))
    return Table("", ("system", *columns), tuple(rows))


def scores(task: TaskSummary) -> Table:
    """Every metric of every system, with the differences to the two models alone."""
    metrics = [scale_of(task, name) for name in numbers.metrics_of(task)]
    columns = ["system", *(scale.unit for scale in metrics), "n", "errors", "unread, %"]
    for base in ("receiver", "sharer"):
        columns += [f"− {base}", "p"]
    rows = []
    for name in ordered(task.systems):
        system = task.systems[name]
        row = [name, *(scale.estimate(system.metrics.get(scale.metric)) for scale in metrics)]
        row += [str(system.rows), str(system.errors), SHARE.number(_value(system.format_failures))]
        for base in ("receiver", "sharer"):
            pair = numbers.against(task, name, base) if name != base else None
            row += [metrics[0].difference(pair.difference if pair else None), numbers.p_value(pair.p if pair else None)]
        rows.append(tuple(row))
    return Table("Scores", tuple(columns), tuple(rows))


def differences(task: TaskSummary) -> Table:
    """Every paired difference that was computed."""
    place = {name: i for i, name in enumerate(ordered(task.systems))}
    rows = [
        (
            f"{pair.a} − {pair.b}",
            numbers.words(pair.metric),
            scale_of(task, pair.metric).difference(pair.difference),
            str(pair.difference.n),
            numbers.p_value(pair.p),
            *(MISSING if count is None else str(count) for count in (pair.only_a, pair.only_b)),
        )
        for pair in sorted(task.pairs, key=lambda pair: (place[pair.a], place[pair.b]))
    ]
    columns = ("pair", "metric", "difference", "rows", "p", "only the first right", "only the second right")
    return Table("Paired differences", columns, tuple(rows))


def behaviour(task: TaskSummary) -> Table:
    """How systems answer, beside whether they are right."""
    columns: dict[str, Callable[[SystemSummary], str]] = {
        "unread, %": lambda s: SHARE.estimate(s.format_failures),
        "cut off, %": lambda s: SHARE.estimate(s.cut_off),
        "calibration error": lambda s: MISSING if s.calibration_error is None else f"{s.calibration_error:.3f}",
        "agreement with sharer, %": lambda s: SHARE.estimate(s.agreement_with_sharer),
        "routed to sharer, %": lambda s: SHARE.number(s.routed_to_sharer),
    }
    return _by_system("Behaviour", task, columns)


def costs(task: TaskSummary) -> Table:
    """Tokens and bytes per row."""
    kinds = ("receiver_read", "sharer_read", "receiver_wrote", "sharer_wrote")
    columns: dict[str, Callable[[SystemSummary], str]] = {
        # The kind is bound now, since it is another one when the column is filled.
        f"tokens {numbers.words(kind)}": lambda s, kind=kind: f"{s.tokens[kind]:.1f}" if kind in s.tokens else MISSING
        for kind in kinds
    }
    columns["cache crossed"] = lambda s: numbers.size(s.cache_bytes) if s.cache_bytes else MISSING
    columns["text crossed"] = lambda s: numbers.size(s.text_bytes) if s.text_bytes else MISSING
    return _by_system("Costs per row", task, columns)


def gap(report: Report) -> Table:
    """Systems × tasks, the share of the gap between receiver and sharer."""
    tasks = [task for task in report.tasks.values() if task.gap_recovered]
    rows = [
        (name, *(SHARE.estimate(task.gap_recovered.get(name)) for task in tasks))
        for name in ordered({name for task in tasks for name in task.gap_recovered})
    ]
    return Table("", ("system", *(f"{task.title}, %" for task in tasks)), tuple(rows))


def latency(report: Report) -> Table:
    """Percentiles."""
    rows = [
        (name, str(found.n), *map(numbers.seconds, (found.mean, found.p50, found.p90, found.p99)))
        for name in ordered(report.latency)
        for found in [report.latency[name]]
    ]
    return Table("Percentiles", ("system", "requests", "mean", "p50", "p90", "p99"), tuple(rows))


def stages(report: Report) -> Table:
    """Mean seconds by stage."""
    names = ordered_stages({stage for found in report.latency.values() for stage in found.stages})
    rows = [
        (system, *(numbers.seconds(found[stage]) if stage in found else MISSING for stage in names))
        for system in ordered(report.latency)
        for found in [report.latency[system].stages]
    ]
    return Table("Mean by stage", ("system", *map(numbers.words, names)), tuple(rows if names else ()))


def tasks(report: Report) -> Table:
    """What was asked, where it comes from, and which rows were left out."""
    rows = [
        (
            task.title,
            task.kind,
            str(task.rows),
            ", ".join(f"{count} {reason}" for reason, count in task.dropped.items()) or "none",
            task.source,
            task.licence,
        )
        for task in report.tasks.values()
    ]
    return Table("", ("task", "kind", "rows", "rows left out", "source", "licence"), tuple(rows), numeric=False)


def definitions(report: Report) -> Table:
    """What the run says that each system is."""
    said = report.run.get("definitions", {})
    names = ordered({*systems_of(report), *report.latency})
    rows = tuple((name, said.get(name, _UNDEFINED)) for name in names)
    return Table("", ("system", "what it is"), rows, numeric=False)


def metrics(report: Report) -> Table:
    """What each metric asks."""
    found = dict.fromkeys(name for task in report.tasks.values() for name in numbers.metrics_of(task))
    rows = tuple((numbers.words(name), METRICS[name].label if name in METRICS else MISSING) for name in found)
    return Table("", ("metric", "what it is"), rows, numeric=False)


def settings(report: Report) -> Table:
    """Everything that the run says of itself, except what stands elsewhere in the report."""
    rest = {key: value for key, value in report.run.items() if key not in ("commands", "definitions")}
    rows = tuple((key, _written(key, value)) for key, value in flattened(rest).items())
    return Table("Settings", ("setting", "value"), rows, numeric=False)


def flattened(value: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings under dotted names."""
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        if isinstance(inner, Mapping) and inner:
            flat |= flattened(inner, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = inner
    return flat


def as_text(value: Any) -> str:
    """A setting in one line."""
    if isinstance(value, list | tuple) and all(isinstance(part, str | int | float) for part in value):
        return ", ".join(map(str, value))
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _written(key: str, value: Any) -> str:
    if isinstance(value, int | float) and not isinstance(value, bool):
        if "bytes" in key:
            return numbers.size(value)
        if key.split(".")[-1] == "seconds":
            return numbers.duration(value)
    return as_text(value)


def _by_system(title: str, task: TaskSummary, columns: Mapping[str, Callable[[SystemSummary], str]]) -> Table:
    """Columns in which no system has anything are left out."""
    names = ordered(task.systems)
    cells: dict[str, Sequence[str]] = {
        column: [write(task.systems[name]) for name in names] for column, write in columns.items()
    }
    kept = {column: found for column, found in cells.items() if any(cell != MISSING for cell in found)}
    rows = zip(names, *kept.values(), strict=True)
    return Table(title, ("system", *kept), tuple(rows) if kept else ())


def _value(estimate: Any) -> float | None:
    return None if estimate is None else estimate.value
