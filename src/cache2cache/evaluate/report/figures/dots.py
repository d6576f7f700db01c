"""Points with intervals, systems under each other, one panel per task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from cache2cache.evaluate.report.figures import style
from cache2cache.evaluate.report.numbers import SHARE, Scale, scale_of
from cache2cache.evaluate.report.order import is_control, ordered
from cache2cache.evaluate.schema import Estimate, Report, TaskSummary

_Panel = tuple[str, Scale, Mapping[str, Estimate]]
"""Title, scale, and what to draw by system."""


def accuracy(report: Report) -> Figure | None:
    """All systems in each task's primary metric."""
    chosen = [panel for task in report.tasks.values() if (panel := _primary(task))[2]]
    return _figure(chosen, sorted({s for _, _, found in chosen for s in found}), style.looks(_systems(report)))


def controls(report: Report) -> Figure | None:
    """C2C and its controls, with the receiver alone as a band; for tasks that have at least one control."""
    kept, bands = [], []
    for task in report.tasks.values():
        title, scale, found = _primary(task)
        drawn = {name: e for name, e in found.items() if name == "c2c" or is_control(name)}
        if any(map(is_control, drawn)):
            kept.append((title, scale, drawn))
            bands.append(found.get("receiver"))
    figure = _figure(kept, sorted({s for _, _, found in kept for s in found}), style.looks(_systems(report)))
    for axes, (_, scale, _), band in zip(figure.axes if figure else [], kept, bands, strict=True):
        if band is not None:
            axes.axvspan(band.low * scale.factor, band.high * scale.factor, color="#dcdcdc", lw=0, zorder=0)
            axes.axvline(band.value * scale.factor, color=style.BLACK, lw=0.9, zorder=1)
    return figure


def gap_recovered(report: Report) -> Figure | None:
    """Each system's share of the gap between receiver and sharer."""
    chosen = [(task.title, SHARE, task.gap_recovered) for task in report.tasks.values() if task.gap_recovered]
    systems = sorted({s for _, _, found in chosen for s in found})
    figure = _figure(chosen, systems, style.looks(_systems(report)), unit="gap recovered, %", zero_to_hundred=False)
    for axes in figure.axes if figure else []:
        for bound in (0, 100):
            axes.axvline(bound, color="#888888", lw=0.9, ls=(0, (4, 3)), zorder=1)
    return figure


def _systems(report: Report) -> list[str]:
    return [name for task in report.tasks.values() for name in task.systems]


def _primary(task: TaskSummary) -> _Panel:
    found = {name: system.metrics.get(task.primary) for name, system in task.systems.items()}
    return task.title, scale_of(task, task.primary), {name: e for name, e in found.items() if e is not None}


def _figure(
    chosen: Sequence[_Panel],
    systems: Sequence[str],
    looks: Mapping[str, style.Look],
    *,
    unit: str | None = None,
    zero_to_hundred: bool = True,
) -> Figure | None:
    if not chosen:
        return None
    names = ordered(systems)
    figure, all_axes = style.panels(len(chosen), columns=4, height=0.9 + 0.23 * len(names), sharey=True)
    for axes, (title, scale, found) in zip(all_axes, chosen, strict=True):
        axes.set_title(style.short(title, 26))
        axes.set_xlabel(unit or style.short(scale.unit, 36))
        axes.set_yticks(range(len(names)), [style.short(name, 24) for name in names])
        axes.set_ylim(len(names) - 0.5, -0.5)
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        for y, name in enumerate(names):
            if name in found:
                _point(axes, y, found[name], scale, looks[name])
        if scale.share and zero_to_hundred:
            axes.set_xlim(0, 100)
    return figure


def _point(axes: Axes, y: int, estimate: Estimate, scale: Scale, look: style.Look) -> None:
    low, value, high = (scale.factor * x for x in (estimate.low, estimate.value, estimate.high))
    axes.plot([low, high], [y, y], color=look.colour, lw=1.6, zorder=2, solid_capstyle="butt")
    axes.plot([value], [y], ms=5.5, ls="", zorder=3, **look.points)
    # In figure-independent coordinates beside the panel, where no point can cover it.
    axes.text(
        1.02, y, scale.number(estimate.value), transform=axes.get_yaxis_transform(), ha="left", va="center", size=7.5
    )
