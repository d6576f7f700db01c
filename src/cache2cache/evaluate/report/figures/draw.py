"""Which figures a report has, in order, with their captions."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cache2cache.errors import MissingExtraError
from cache2cache.evaluate.schema import Report, RowRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Drawing:
    """One figure of a report."""

    name: str
    """Of its file, without ending."""
    caption: str
    """What the figure shows and how to read it."""
    png: bytes
    task: str | None = None
    """The task that it belongs to; None if it shows all of them."""


def draw(report: Report, rows: Sequence[RowRecord]) -> list[Drawing]:
    """Every figure that there is data for.

    Raises:
        MissingExtraError: matplotlib is not installed.
    """
    try:
        from cache2cache.evaluate.report.figures import style
    except ModuleNotFoundError as error:
        raise MissingExtraError("figures need matplotlib", hint="pip install 'cache2cache[eval]'") from error

    with style.styled():
        return [
            Drawing(name, caption, style.png(drawn), task)
            for name, caption, task, make in _plan(report, rows)
            if (drawn := make()) is not None
        ]


_Plan = tuple[str, str, str | None, Callable[[], "Figure | None"]]


def _plan(report: Report, rows: Sequence[RowRecord]) -> Iterator[_Plan]:
    from cache2cache.evaluate.report.figures import costs, dots, heat, upset

    yield (
        "accuracy",
        "Every system on every task, in the task's primary metric, with 95 % intervals. Controls are hollow.",
        None,
        lambda: dots.accuracy(report),
    )
    yield (
        "controls",
        "C2C with the right sharer cache against its controls. The grey band is the receiver alone: what a control "
        "brings when nothing of this row crosses.",
        None,
        lambda: dots.controls(report),
    )
    yield (
        "gap_recovered",
        "Share of the gap between receiver and sharer that a system recovers, with 95 % intervals: 0 is the receiver, "
        "100 the sharer. Tasks without a clear gap are left out.",
        None,
        lambda: dots.gap_recovered(report),
    )
    yield (
        "who_is_right",
        "Which systems answer the same rows right: every row that all of them answered is in exactly one column.",
        None,
        lambda: upset.who_is_right(report, rows),
    )
    yield (
        "accuracy_latency",
        "Primary metric against the median seconds of one request alone, nothing reused. Controls are left out.",
        None,
        lambda: costs.accuracy_latency(report),
    )
    yield (
        "latency_stages",
        "Where the time of one request goes: mean seconds by stage.",
        None,
        lambda: costs.latency_stages(report),
    )
    taken: set[str] = set()
    for name, task in report.tasks.items():
        file = "subjects_" + re.sub(r"[^A-Za-z0-9-]+", "_", name)
        while file in taken:
            file += "_"
        taken.add(file)
        # The task is bound now, since the figure is drawn later.
        yield file, f"{task.title} by subject.", name, lambda task=task: heat.subjects(task)
