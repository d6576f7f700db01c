"""What answers cost: accuracy against latency, and latency by stage."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from cache2cache.evaluate.report.figures import style
from cache2cache.evaluate.report.numbers import scale_of, seconds, words
from cache2cache.evaluate.report.order import is_control, ordered, ordered_stages
from cache2cache.evaluate.schema import Report

_COLOURS = {
    "tokenise": style.BLACK,
    "align": style.PURPLE,
    "sharer_prefill": style.BLUE,
    "message": style.ORANGE,
    "receiver_prefill": style.SKY,
    "fuse": style.RED,
    "decode": style.GREY,
}
_OTHER_STAGES = (style.YELLOW, style.GREEN, "#7f7f7f", "#b8e0d2", "#f4c6a5")
_UNNAMED = "#dddddd"
_UNSEEN = 0.005


def accuracy_latency(report: Report) -> Figure | None:
    """The primary metric against the median seconds of a request, one panel per task; controls are nothing to buy."""
    looks = style.looks([name for task in report.tasks.values() for name in task.systems])
    chosen = []
    for task in report.tasks.values():
        points = {
            name: (report.latency[name].p50, estimate)
            for name, system in task.systems.items()
            if not is_control(name) and name in report.latency and (estimate := system.metrics.get(task.primary))
        }
        if points:
            chosen.append((task, points))
    if not chosen:
        return None
    figure, all_axes = style.panels(len(chosen), columns=2, height=3.0, extra=0.8)
    for axes, (task, points) in zip(all_axes, chosen, strict=True):
        scale = scale_of(task, task.primary)
        for name, (p50, estimate) in points.items():
            low, value, high = (scale.factor * x for x in (estimate.low, estimate.value, estimate.high))
            axes.plot([p50, p50], [low, high], color=looks[name].colour, lw=1.2, alpha=0.6, zorder=2)
            axes.plot([p50], [value], ms=6.5, ls="", zorder=3, **looks[name].points)
        axes.set_title(style.short(task.title, 50))
        axes.set_ylabel(style.short(scale.unit, 40))
        axes.set_xlabel("seconds per request, median, log scale")
        style.log_seconds(axes)
        axes.grid()
        if scale.share:
            axes.set_ylim(0, 100)
    shown = ordered({name for _, points in chosen for name in points})
    handles = [Line2D([], [], ms=6.5, ls="", label=style.short(name), **looks[name].points) for name in shown]
    lines = math.ceil(len(shown) / 6)
    figure.legend(handles=handles, loc="outside lower center", ncols=math.ceil(len(shown) / lines))
    return figure


def latency_stages(report: Report) -> Figure | None:
    """Stacked bars of mean seconds by stage; what no stage accounts for is a bar of its own."""
    if not report.latency:
        return None
    names = ordered(report.latency)
    stages = ordered_stages({stage for name in names for stage, taken in report.latency[name].stages.items() if taken})
    colours = dict(_COLOURS)
    for i, stage in enumerate(stage for stage in stages if stage not in _COLOURS):
        colours[stage] = _OTHER_STAGES[i % len(_OTHER_STAGES)]
    figure = style.figure(1.2 + 0.3 * len(names), width=8.0)
    axes = figure.subplots()
    left = [0.0] * len(names)
    for stage in stages:
        widths = [report.latency[name].stages.get(stage, 0.0) for name in names]
        axes.barh(range(len(names)), widths, left=left, height=0.62, color=colours[stage], label=words(stage))
        left = [a + b for a, b in zip(left, widths, strict=True)]
    means = [report.latency[name].mean for name in names]
    rest = [max(0.0, mean - done) for mean, done in zip(means, left, strict=True)]
    if any(width > _UNSEEN * mean for width, mean in zip(rest, means, strict=True)):
        axes.barh(range(len(names)), rest, left=left, height=0.62, color=_UNNAMED, label="between stages")
    for y, (mean, end) in enumerate(zip(means, left, strict=True)):
        axes.text(max(mean, end), y, f"  {seconds(mean)}", va="center", size=8)
    axes.set_yticks(range(len(names)), [style.short(name, 24) for name in names])
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(len(names) - 0.4, -0.6)
    axes.set_xlabel("seconds per request, mean")
    axes.margins(x=0.08)
    axes.set_xlim(left=0)
    axes.grid(axis="x")
    axes.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    return figure
