"""How much an engine takes on, and who is answered next: a bounded queue, first come first served, a budget of memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from cache2cache.errors import BusyError, RequestError
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.serve.job import Job


@dataclass(frozen=True)
class Limits:
    """Of an engine."""

    max_batch: int = 16
    """Most answers that are read for or written at a time."""
    max_waiting: int = 64
    """Most requests that wait beside them."""
    memory_bytes: int | None = None
    """Of caches, see each engine; None for no limit. A request whose cache does not fit now waits, and those that came
    after it wait behind it."""
    max_new_tokens: int = 1024
    """Most tokens of an answer, and as many as are written when a request does not say."""


DEFAULT = Limits()


class Queue:
    """Jobs that wait, shared by the event loop and the worker.

    Args:
        size: most jobs that wait.
    """

    def __init__(self, size: int):
        self.size = size
        self._jobs: deque[Job] = deque()
        self._changed = threading.Condition()
        self._closed = False
        self.news = False
        """Whether somebody has come since the worker last looked."""

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, job: Job, retry_after: float) -> None:
        """Wait behind the others.

        Raises:
            BusyError: the queue is full.
        """
        with self._changed:
            if len(self._jobs) >= self.size:
                raise BusyError(
                    "the queue is full", got=f"{len(self._jobs)} requests that wait", allowed=self.size,
                    hint=f"Ask again in {retry_after:.0f} s", retry_after=retry_after,
                )  # fmt: skip
            self._jobs.append(job)
            self.news = True
            self._changed.notify_all()

    def discard(self, job: Job) -> None:
        """Wait no longer, if the job still does."""
        with self._changed:
            if job in self._jobs:
                self._jobs.remove(job)

    def first(self) -> Job | None:
        """Who has waited longest; stays in the queue."""
        with self._changed:
            return self._jobs[0] if self._jobs else None

    def close(self) -> None:
        """Let the worker leave."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def wake(self) -> None:
        """Let the worker look again whether there is room."""
        with self._changed:
            self._changed.notify_all()

    def wait(self, *, idle: bool, room: Callable[[], bool] = lambda: True) -> bool:
        """Whether there may be work; with `idle`, as soon as somebody waits and there is room. False once the queue is
        closed."""
        with self._changed:
            if idle:
                self._changed.wait_for(lambda: (self._jobs and room()) or self._closed)
            return not self._closed


class Budget:
    """Memory for caches, counted as a batch holds them: all rows as wide as the widest, and as long as it may get.

    Args:
        limit: bytes; None for no limit.
        keep: whether the sharers' caches are kept for a prefix cache as long as an answer is written.
    """

    def __init__(self, limit: int | None, *, keep: bool):
        self.limit, self._keep = limit, keep

    def running(self, pair: C2C, jobs: Sequence[Job]) -> int:
        """Bytes that a pair's batch takes while it is written."""
        if not jobs:
            return 0
        own = len(jobs) * max(job.positions for job in jobs) * per_position(pair.receiver)
        return own + (self.reading(pair, jobs) if self._keep else 0)

    def reading(self, pair: C2C, jobs: Sequence[Job]) -> int:
        """Bytes of the sharers' caches while these are read."""
        if not jobs:
            return 0
        widths = (max(job.sharer_positions(i) for job in jobs) for i in range(len(pair.sharers)))
        return len(jobs) * sum(n * per_position(lm) for n, lm in zip(widths, pair.sharers, strict=True))

    def fits(self, size: int) -> bool:
        """Whether so many bytes are within the budget."""
        return self.limit is None or size <= self.limit

    def check(self, size: int, hint: str) -> None:
        """Raise RequestError if so many bytes, which one request takes by itself, can never be had."""
        if not self.fits(size):
            raise RequestError(
                "the request needs more memory than the server has",
                got=f"{size:,} bytes of cache", allowed=f"up to {self.limit:,}", hint=hint,
            )  # fmt: skip


def per_position(lm: LanguageModel) -> int:
    """Bytes of cache that one token takes."""
    size = lm.card.geometry
    return 2 * size.layers * size.features * lm.dtype.itemsize
