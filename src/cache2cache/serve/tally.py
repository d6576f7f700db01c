"""What an engine has done so far, and how long its answers take."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager

from cache2cache.serve.job import Answer
from cache2cache.types import Timings

_COUNTED = (
    "answers",
    "tokens_prompt",
    "tokens_cached",
    "tokens_sharer",
    "tokens_generated",
    "prefix_hits",
    "sharer_bytes",
)


class Tally:
    """Sums since the start; may be read from another thread."""

    def __init__(self):
        self.sums = dict.fromkeys((*(f"seconds_{stage}" for stage in vars(Timings())), *_COUNTED), 0.0)
        """See `Load.counters`."""
        self._answer_seconds = 1.0

    @contextmanager
    def timed(self) -> Iterator[Timings]:
        """Seconds of each stage of what happens inside."""
        timings = Timings()
        try:
            yield timings
        finally:
            for stage, seconds in vars(timings).items():
                self.sums[f"seconds_{stage}"] += seconds

    def begun(self, answer: Answer) -> None:
        """What an answer is written from has been read."""
        self.sums["tokens_prompt"] += answer.usage.prompt_tokens
        self.sums["tokens_cached"] += answer.usage.cached_tokens
        self.sums["tokens_sharer"] += sum(answer.usage.sharer_tokens)
        self.sums["sharer_bytes"] += answer.usage.cache_bytes

    def ended(self, answer: Answer) -> None:
        """An answer is complete."""
        self.sums["answers"] += 1
        self._answer_seconds += 0.1 * (time.monotonic() - answer.begun - self._answer_seconds)

    def retry_after(self, waiting: int, at_once: int) -> float:
        """Seconds until those who wait now have been answered, about.

        Args:
            at_once: answers that are written at a time.
        """
        return max(1.0, math.ceil(waiting * self._answer_seconds / at_once))
