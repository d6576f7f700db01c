"""The report in the terminal: one table per task."""

from __future__ import annotations

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from cache2cache.evaluate.report import numbers
from cache2cache.evaluate.report.content import title
from cache2cache.evaluate.report.numbers import MISSING, SHARE, Scale, scale_of
from cache2cache.evaluate.report.order import is_control, ordered
from cache2cache.evaluate.schema import Estimate, LatencySummary, PairSummary, Report, SystemSummary, TaskSummary

_BASES = ("receiver", "sharer")
_METRICS = 2
"""Shown here; the files have all of them."""


def print_table(report: Report, console: Console) -> None:
    """Print every task: its systems, and whether example-specific transfer is shown.

    Made for 120 columns; in fewer, names stay whole.
    """
    console.print(Text(title(report), style="bold"), "\n", sep="")
    for task in report.tasks.values():
        console.print(_heading(task))
        console.print(_table(task, report.latency))
        for transfer in task.transfer:
            console.print(Text(transfer.sentence, style="green" if transfer.shown else "yellow"))
        console.print()


def plain_table() -> Table:
    """An empty table without frames, its columns close together."""
    return Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False, collapse_padding=True)


def _table(task: TaskSummary, latency: dict[str, LatencySummary]) -> Table:
    metrics = _shown(task)
    table = plain_table()
    table.add_column("system", no_wrap=True, min_width=max(map(len, task.systems)))
    for scale in metrics:
        unit = f"{numbers.words(scale.metric)}\n{'%' if scale.share else ''}"
        table.add_column(Text(unit), justify="right", no_wrap=True)
    for name in ("n", "errors", "unread\n%"):
        table.add_column(name, justify="right", no_wrap=True)
    for base in _BASES:
        table.add_column(f"− {base}", justify="right", no_wrap=True)
    table.add_column("tokens\nin + out", justify="right", no_wrap=True)
    table.add_column("s\np50", justify="right", no_wrap=True)
    for name in ordered(task.systems):
        system = task.systems[name]
        table.add_row(
            Text(name, style="dim" if is_control(name) else "bold" if name == "c2c" else ""),
            *(_estimate(scale, system.metrics.get(scale.metric)) for scale in metrics),
            str(system.rows),
            Text(str(system.errors), style="red" if system.errors else "dim"),
            SHARE.number(None if system.format_failures is None else system.format_failures.value),
            *(_difference(metrics[0], None if name == base else numbers.against(task, name, base)) for base in _BASES),
            _tokens(system),
            numbers.seconds(latency[name].p50) if name in latency else MISSING,
        )
    return table


def _shown(task: TaskSummary) -> list[Scale]:
    return [scale_of(task, name) for name in numbers.metrics_of(task)[:_METRICS]]


def _heading(task: TaskSummary) -> Text:
    less = [numbers.words(scale.metric) for scale in _shown(task) if scale.lower_is_better]
    rows = f"  {task.rows} rows" + (f", less is better: {', '.join(less)}" if less else "")
    return Text.assemble((task.title, "bold"), rows)


def _estimate(scale: Scale, estimate: Estimate | None) -> Text:
    if estimate is None:
        return Text(MISSING)
    return Text.assemble(scale.number(estimate.value), "\n", (scale.interval(estimate), "dim"))


def _difference(scale: Scale, pair: PairSummary | None) -> Text:
    """The interval under the difference, McNemar's p beside it."""
    if pair is None:
        return Text(MISSING)
    p = "" if pair.p is None else f" p{numbers.p_value(pair.p, equals='=')}"
    return Text.assemble(scale.signed(pair.difference.value), p, "\n", (scale.interval(pair.difference), "dim"))


def _tokens(system: SystemSummary) -> Text:
    """The receiver's above the sharer's."""
    if not system.tokens:
        return Text(MISSING)
    lines = []
    for model in _BASES:
        read, wrote = (system.tokens.get(f"{model}_{verb}", 0.0) for verb in ("read", "wrote"))
        lines.append(f"{model[0]} {read:.0f} + {wrote:.0f}" if read or wrote else "")
    return Text("\n".join(line for line in lines if line))
