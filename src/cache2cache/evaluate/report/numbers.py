"""Numbers as text, the same in the terminal, in Markdown and in HTML. Knows no layout."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cache2cache.evaluate.schema import Estimate, PairSummary, TaskSummary

MISSING = "–"
"""Stands where there is no number."""


@dataclass(frozen=True)
class Scale:
    """How one metric of one task is written: shares in per cent, others as they are."""

    metric: str
    share: bool
    lower_is_better: bool

    @property
    def factor(self) -> float:
        """What a value is multiplied by to be written or drawn."""
        return 100.0 if self.share else 1.0

    @property
    def unit(self) -> str:
        """The metric's name with what a reader must know about its numbers."""
        return f"{words(self.metric)}{', %' if self.share else ''}{', less is better' if self.lower_is_better else ''}"

    def number(self, value: float | None) -> str:
        """66.2 for a share, 1.234 for anything else."""
        if value is None or not math.isfinite(value):
            return MISSING
        return _signs(f"{value * self.factor:.{1 if self.share else 3}f}")

    def interval(self, estimate: Estimate | None) -> str:
        """61.9–70.2; with the word "to" where a sign would be taken for the dash."""
        if estimate is None:
            return MISSING
        dash = "–" if estimate.low >= 0 else " to "
        return f"{self.number(estimate.low)}{dash}{self.number(estimate.high)}"

    def estimate(self, estimate: Estimate | None) -> str:
        """66.2 (61.9–70.2)."""
        return MISSING if estimate is None else f"{self.number(estimate.value)} ({self.interval(estimate)})"

    def signed(self, value: float | None) -> str:
        """+3.8."""
        text = self.number(value)
        return text if text == MISSING or text.startswith("−") else f"+{text}"

    def difference(self, estimate: Estimate | None) -> str:
        """+3.8 (0.8–7.1); shares in percentage points."""
        return MISSING if estimate is None else f"{self.signed(estimate.value)} ({self.interval(estimate)})"


SHARE = Scale("share", share=True, lower_is_better=False)
"""For what is always a share: format failures, agreement, gap recovered."""


def scale_of(task: TaskSummary, metric: str) -> Scale:
    """A metric is a share if more is better and everything that was measured of it lies between 0 and 1."""
    found = [e for system in task.systems.values() if (e := system.metrics.get(metric))]
    lower = metric in task.lower_is_better
    inside = all(0 <= bound <= 1 for e in found for bound in (e.low, e.value, e.high) if math.isfinite(bound))
    return Scale(metric, share=not lower and inside, lower_is_better=lower)


def metrics_of(task: TaskSummary) -> list[str]:
    """The primary metric, then the others in the order in which the systems list them."""
    others = dict.fromkeys(name for system in task.systems.values() for name in system.metrics)
    return list(dict.fromkeys([task.primary, *others]))


def against(task: TaskSummary, a: str, b: str) -> PairSummary | None:
    """The paired comparison a − b in the primary metric, whichever way round it was stored."""
    for pair in task.pairs:
        if pair.metric == task.primary and (pair.a, pair.b) == (a, b):
            return pair
        if pair.metric == task.primary and (pair.a, pair.b) == (b, a):
            d = pair.difference
            turned = Estimate(value=-d.value, low=-d.high, high=-d.low, n=d.n)
            changes = {"a": a, "b": b, "difference": turned, "only_a": pair.only_b, "only_b": pair.only_a}
            return pair.model_copy(update=changes)
    return None


def p_value(p: float | None, *, equals: str = "") -> str:
    """Three decimals after `equals`, or that it is less than the least of them."""
    if p is None:
        return MISSING
    return "<0.001" if p < 0.001 else f"{equals}{p:.3f}"


def seconds(value: float) -> str:
    """Three significant digits, without exponents."""
    if value == 0 or value >= 100:
        return f"{value:.0f}"
    return f"{value:.{max(0, min(4, 2 - math.floor(math.log10(value))))}f}"


def size(value: float) -> str:
    """Bytes in decimal units: 812 B, 24.6 kB, 4.34 GB."""
    unit = 0
    while value >= 1000 and unit < 4:
        value, unit = value / 1000, unit + 1
    return f"{value:.0f} B" if unit == 0 else f"{value:.3g} {' kMGT'[unit]}B"


def duration(value: float) -> str:
    """Of a whole run: 3 h 04 min, 12 min 30 s, 8.2 s."""
    if value < 60:
        return f"{value:.1f} s"
    minutes, rest = divmod(round(value), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def words(name: str) -> str:
    """An identifier as a reader sees it."""
    return name.replace("_", " ")


def _signs(text: str) -> str:
    return f"−{text[1:]}" if text.startswith("-") and float(text) else text.lstrip("-")
