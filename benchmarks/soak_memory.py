"""Memory of processes over time, and whether it grows."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import psutil

WARM_UP = 0.25
"""Share of a series that is left out: allocators and caches of libraries fill up first."""

FEWEST = 12
"""Samples of a series that says something."""

Samples = Sequence[tuple[float, float]]
"""(moment in seconds, MB), in order."""


@dataclass(frozen=True)
class Trend:
    """Of one series, after its warm-up."""

    first: float
    """MB, median of the first third."""
    last: float
    """MB, median of the last third."""
    peak: float
    slope: float
    """MB per minute, by least squares."""

    @classmethod
    def of(cls, samples: Samples) -> Trend | None:
        """None if there are too few samples."""
        kept = np.array(samples[int(len(samples) * WARM_UP) :])
        if len(kept) < FEWEST:
            return None
        third = len(kept) // 3
        first, last = (float(np.median(part)) for part in (kept[:third, 1], kept[-third:, 1]))
        slope = float(np.polyfit(kept[:, 0] / 60, kept[:, 1], 1)[0])
        return cls(first, last, float(kept[:, 1].max()), slope)

    @property
    def growth(self) -> float:
        """MB from the first third to the last."""
        return self.last - self.first


@dataclass
class Memory:
    """Resident memory of processes and all that they have started."""

    samples: dict[str, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))
    """By the name that a process goes by."""

    def look(self, name: str, pid: int) -> None:
        """Take a sample, unless the process has gone."""
        try:
            process = psutil.Process(pid)
            family = [process, *process.children(recursive=True)]
            megabytes = sum(each.memory_info().rss for each in family) / 2**20
        except psutil.NoSuchProcess:
            return
        if megabytes:  # a process that is being killed has none
            self.samples[name].append((time.monotonic(), megabytes))

    def trends(self) -> dict[str, Trend]:
        """Of every series that is long enough."""
        return {name: trend for name, samples in self.samples.items() if (trend := Trend.of(samples))}
