"""What engines have in common whose requests wait in a queue for a thread that reads prompts."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence
from typing import Protocol

from cache2cache.errors import BusyError, RequestError
from cache2cache.pipeline import C2C
from cache2cache.serve import sampling
from cache2cache.serve.admission import Queue
from cache2cache.serve.engine import Event, Load, Request
from cache2cache.serve.job import Job


class Working(Protocol):
    """What such a thread does."""

    queue: Queue

    def run(self) -> None:
        """Work until the queue is closed."""
        ...

    def load(self) -> Load:
        """How busy it is; may be asked from another thread."""
        ...

    def retry_after(self) -> float:
        """Seconds until those who wait now have been answered, about; likewise."""
        ...


class QueuedEngine:
    """Takes requests, hands them to a worker, and passes on what comes back. See `Engine`.

    Args:
        max_new_tokens: most tokens of an answer.
    """

    def __init__(self, pair: C2C, worker: Working, max_new_tokens: int):
        self._pair, self._max_new_tokens, self._worker = pair, max_new_tokens, worker
        self._thread = threading.Thread(target=worker.run, name="c2c-engine", daemon=True)
        self._open: set[Job] = set()
        self._all_closed = asyncio.Event()
        self._stopping = False

    @property
    def sharers(self) -> Sequence[str]:
        """See `Engine`."""
        return [lm.card.id for lm in self._pair.sharers]

    @property
    def alone(self) -> Sequence[int]:
        """See `Engine`."""
        return ()

    @property
    def receiver(self) -> str:
        """See `Engine`."""
        return self._pair.receiver.card.id

    @property
    def max_waiting(self) -> int:
        """See `Engine`."""
        return self._worker.queue.size

    @property
    def alive(self) -> bool:
        """See `Engine`."""
        return self._thread.is_alive()

    async def start(self) -> None:
        """See `Engine`."""
        self._thread.start()

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """See `Engine`.

        Raises:
            BusyError: the queue is full, or the engine stops.
            RequestError: an unknown sharer, an option out of range, or more memory than there is.
            ConversationError, TemplateError, AlignmentError, ContextLengthError: a prompt that cannot be read.
            SharerError: a sharer elsewhere cannot be heard, and the pair does not answer without it.
        """
        self.check(request)
        if self._stopping:
            raise BusyError("the server is about to stop")
        job = Job(request, asyncio.get_running_loop())
        self._worker.queue.put(job, self._worker.retry_after())
        self._open.add(job)
        self._all_closed.clear()
        try:
            while isinstance(item := await job.received.get(), Event) and item.finish is None:
                yield item
        finally:
            self.cancel(job)
            self._open.discard(job)
            if not self._open:
                self._all_closed.set()
        if isinstance(item, Exception):
            raise item
        yield item

    def load(self) -> Load:
        """See `Engine`."""
        return self._worker.load()

    async def stop(self, grace: float) -> None:
        """See `Engine`. Requests that are cancelled get a BusyError."""
        self._stopping = True
        if self._open:
            try:
                await asyncio.wait_for(self._all_closed.wait(), grace)
            except TimeoutError:
                for job in list(self._open):
                    self.cancel(job)
                    job.received.put_nowait(BusyError("the server has stopped before the answer was complete"))
        self._worker.queue.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def cancel(self, job: Job) -> None:
        """Nobody wants the answer any more, or it is complete."""
        job.cancelled = True
        self._worker.queue.discard(job)

    def check(self, request: Request) -> None:
        """Raise RequestError unless the request can be answered here, as far as that is seen without reading it."""
        names = dict(enumerate(self.sharers))
        if unknown := [i for i in request.sharers if i not in names]:
            raise RequestError("no such sharer", got=unknown, allowed=names, field="sharers")
        if request.alone is not None and request.alone not in self.alone:
            raise RequestError("no such sharer answers by itself here", got=request.alone, allowed=self.alone)
        if request.alone is not None and request.sharers:
            raise RequestError(
                "a sharer that answers by itself hears nobody",
                got=request.sharers,
                allowed="no sharers",
                field="sharers",
            )
        sampling.check(request.sampling)
        if (request.sampling.max_tokens or 1) > self._max_new_tokens:
            raise RequestError(
                "more tokens are asked for than this server writes",
                got=request.sampling.max_tokens, allowed=f"up to {self._max_new_tokens}", field="max_tokens",
            )  # fmt: skip
