"""Subjects × systems as a heat map."""

from __future__ import annotations

import math

from matplotlib.figure import Figure

from cache2cache.evaluate.report.figures import style
from cache2cache.evaluate.report.numbers import scale_of
from cache2cache.evaluate.report.order import ordered
from cache2cache.evaluate.schema import TaskSummary

FEWEST, MOST = 4, 60
"""Subjects: fewer need no figure, more cannot be read."""
_MAP = "cividis"


def subjects(task: TaskSummary) -> Figure | None:
    """The primary metric of every system in every subject, those with the most rows if there are too many."""
    names = ordered({name for found in task.subjects.values() for name in found})
    if len(task.subjects) < FEWEST or not names:
        return None
    sizes = {subject: max((e.n for e in found.values()), default=0) for subject, found in task.subjects.items()}
    largest = sorted(sizes, key=lambda subject: (-sizes[subject], subject))[:MOST]
    shown = sorted(largest)
    scale = scale_of(task, task.primary)
    values = [
        [scale.factor * e.value if (e := task.subjects[s].get(name)) else math.nan for name in names] for s in shown
    ]
    finite = [value for row in values for value in row if math.isfinite(value)]
    low, high = (0.0, 100.0) if scale.share else (min(finite, default=0.0), max(finite, default=1.0))

    # Beside the cells: the subjects' names on the left, the scale on the right; above them the systems' names.
    figure = style.figure(1.6 + 0.2 * len(shown), width=3.4 + 0.55 * len(names))
    axes = figure.subplots()
    image = axes.imshow(values, cmap=_MAP, vmin=low, vmax=high, aspect="auto")
    axes.set_xticks(
        range(len(names)),
        [style.short(name, 20) for name in names],
        rotation=40,
        rotation_mode="anchor",
        ha="left",
        size=8,
    )
    axes.xaxis.tick_top()
    axes.set_yticks(range(len(shown)), [f"{style.short(s, 36)}  ({sizes[s]})" for s in shown], size=7.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    middle = (low + high) / 2
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            if math.isfinite(value):
                text = f"{value:.0f}" if scale.share else f"{value:.2f}"
                # The lower half of the map is dark, the upper bright, so one of the two is always readable.
                axes.text(
                    x, y, text, ha="center", va="center", size=7, color="white" if value < middle else style.BLACK
                )
    left_out = "" if len(shown) == len(task.subjects) else f", the {MOST} of {len(task.subjects)} with the most rows"
    axes.set_xlabel(f"{scale.unit}; rows in brackets{left_out}")
    bar = figure.colorbar(image, ax=axes, fraction=0.03, pad=0.02, aspect=30)
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]
    return figure
