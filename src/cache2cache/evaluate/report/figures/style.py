"""How every figure looks: one colour and marker per system, type sizes, sizes in inches."""

from __future__ import annotations

import io
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator

from cache2cache.evaluate.report.order import base, is_known, ordered

# Okabe and Ito's palette, which the colour-blind tell apart; https://jfly.uni-koeln.de/color/. Its yellow is too pale
# for points on white and is left to areas.
BLACK, GREY, BLUE, SKY = "#000000", "#999999", "#0072B2", "#56B4E9"
GREEN, ORANGE, RED, PURPLE, YELLOW = "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#F0E442"

_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 8.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": False,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8.5,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "text.parse_math": False,  # a $ in the name of a model or a task is a dollar sign
}
DPI = 160
WIDTH = 10.0


@dataclass(frozen=True)
class Look:
    """How one system is drawn, everywhere."""

    colour: str
    marker: str
    hollow: bool = False
    """Controls are hollow."""

    @property
    def points(self) -> dict[str, Any]:
        """Keyword arguments of `Axes.plot` and `Axes.errorbar`."""
        face = "white" if self.hollow else self.colour
        return {"color": self.colour, "marker": self.marker, "markerfacecolor": face, "markeredgewidth": 1.4}


_LOOKS = {
    "receiver": Look(BLACK, "o"),
    "sharer": Look(BLUE, "s"),
    "routing": Look(PURPLE, "D"),
    "t2t": Look(ORANGE, "^"),
    "t2t-fair": Look(ORANGE, "v"),
    "c2c": Look(RED, "o"),
    "mismatched": Look(SKY, "o", hollow=True),
    "zeroed": Look(GREEN, "s", hollow=True),
    "random": Look(GREY, "D", hollow=True),
    "self": Look(PURPLE, "^", hollow=True),
    "without-sharer": Look(BLUE, "v", hollow=True),
}
_NUMBERED = "PXp*"
_OTHERS = [Look(colour, marker) for marker in "*hdH" for colour in (GREEN, SKY, PURPLE, GREY, BLUE, ORANGE)]


def looks(names: Iterable[str]) -> dict[str, Look]:
    """Every system's look, in the order of a report. One of several has its kind's colour; systems that the report does
    not know share out what is left."""
    found = ordered(names)
    strangers = [name for name in found if not is_known(name)]
    return {name: _known(name) if is_known(name) else _OTHERS[strangers.index(name) % len(_OTHERS)] for name in found}


def _known(name: str) -> Look:
    kind, number = base(name)
    return replace(_LOOKS[kind], marker=_NUMBERED[(number - 1) % len(_NUMBERED)]) if number else _LOOKS[kind]


def styled():
    """The context in which figures are made."""
    return rc_context(_STYLE)


def figure(height: float, *, width: float = WIDTH) -> Figure:
    return Figure(figsize=(width, height), layout="constrained")


def panels(count: int, *, columns: int, height: float, extra: float = 0.0, sharey: bool = False):
    """A figure of `count` panels in rows of at most `columns`.

    Args:
        height: of each row of panels, in inches.
        extra: height of what stands outside the panels.

    Returns:
        The figure and its axes in reading order.
    """
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    width = WIDTH if columns > 2 else 4.0 + 3.0 * (columns - 1)
    drawn = figure(rows * height + extra, width=width)
    axes = list(drawn.subplots(rows, columns, squeeze=False, sharey=sharey).flat)
    for unused in axes[count:]:
        unused.remove()
    return drawn, axes[:count]


def log_seconds(axes: Axes) -> None:
    """A logarithmic x axis of seconds with plain numbers at 1, 2 and 5."""
    axes.set_xscale("log")
    axes.xaxis.set_major_locator(LogLocator(10, subs=(1.0, 2.0, 5.0)))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(LogLocator(10, subs=range(1, 10)))
    axes.xaxis.set_minor_formatter(FuncFormatter(lambda value, _: ""))


def short(text: str, most: int = 34) -> str:
    """One line that fits beside an axis."""
    text = " ".join(text.split())
    return text if len(text) <= most else f"{text[: most - 1]}…"


def png(drawn: Figure) -> bytes:
    """The same bytes for the same figure: no date, no version."""
    stream = io.BytesIO()
    drawn.savefig(stream, format="png", dpi=DPI, facecolor="white", metadata={"Software": None})
    return stream.getvalue()
