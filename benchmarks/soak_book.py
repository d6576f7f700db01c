"""What happened in a soak, and what should not have."""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, field

AFTERMATH = 5.0
"""Seconds after a sharer has come back in which requests may still fail: it is not asked again at once."""

_SHOWN = 40


@dataclass
class Outage:
    """A time in which the sharer cannot be heard."""

    begun: float
    ended: float = math.inf


@dataclass
class Book:
    """Keeps count. Moments are seconds since the book was opened."""

    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    """(what a client did, what came of it) → how often."""
    violations: list[str] = field(default_factory=list)
    outages: list[Outage] = field(default_factory=list)
    opened: float = field(default_factory=time.monotonic)

    def now(self) -> float:
        """The present moment."""
        return time.monotonic() - self.opened

    def violation(self, what: str) -> None:
        """Something that must not happen has."""
        self.violations.append(f"{self.now():.1f} s: {what}")

    @property
    def heard(self) -> bool:
        """Whether the sharer is there now."""
        return all(math.isfinite(outage.ended) for outage in self.outages)

    def unheard(self, begun: float) -> bool:
        """Whether the sharer was away at some moment from `begun` until now."""
        now = self.now()
        return any(outage.begun <= now and begun <= outage.ended + AFTERMATH for outage in self.outages)

    def require(self, outcome: str, why: str) -> None:
        """A soak in which something never came about has not tested it."""
        if not self.total(outcome):
            self.violation(why)

    def total(self, outcome: str) -> int:
        """How often it came about, whatever was done."""
        return sum(count for (_, came), count in self.counts.items() if came == outcome)

    def table(self) -> str:
        """Counts as Markdown."""
        actions = list(dict.fromkeys(action for action, _ in sorted(self.counts)))
        outcomes = list(dict.fromkeys(outcome for _, outcome in sorted(self.counts, key=lambda key: key[1])))
        lines = [f"| | {' | '.join(outcomes)} |", f"|---|{'---:|' * len(outcomes)}"]
        for action in actions:
            lines.append(f"| {action} | {' | '.join(f'{self.counts[action, outcome]:,}' for outcome in outcomes)} |")
        return "\n".join(lines)

    def listing(self) -> str:
        """Violations, one per line."""
        more = len(self.violations) - _SHOWN
        return "\n".join([*self.violations[:_SHOWN], *([f"… and {more:,} more"] if more > 0 else [])])
