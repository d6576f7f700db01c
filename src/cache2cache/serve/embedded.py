"""The embedded engine: one thread, transformers' `generate`, batches that rows join and leave between its calls.

Simple on purpose. Where load outgrows it, vLLM answers.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Sequence

from cache2cache.errors import BusyError, RequestError
from cache2cache.pipeline import C2C
from cache2cache.serve import sampling
from cache2cache.serve.engine import Event, Load, Request
from cache2cache.serve.job import Job
from cache2cache.serve.worker import Worker


class TransformersEngine:
    """Answers with the models of a pair, in this process. See `Engine`.

    In float32, an answer is what the same request gets alone, whatever else is in its batch. In bfloat16 the last bits
    of a sum depend on the shape of the batch, and now and then a token with them.

    Of a model's generation config only the end tokens are used: penalties and the like would not be the request's.

    Args:
        max_batch: most answers that are written at a time.
        max_waiting: most requests that wait beside them.
        memory_bytes: of caches, without the prefix cache; None for no limit. A request whose cache does not fit now
            waits, and those that came after it wait behind it.
        max_new_tokens: most tokens of an answer, and as many as are written when a request does not say.
        prefix_bytes: of conversations that are kept for requests that go on with them; 0 keeps none. With it, a request
            that goes on gets the answer that `Chat` would give, where a fresh one has all turns fused in one go.
    """

    def __init__(
        self,
        pair: C2C,
        *,
        max_batch: int = 16,
        max_waiting: int = 64,
        memory_bytes: int | None = None,
        max_new_tokens: int = 1024,
        prefix_bytes: int = 0,
    ):
        self._pair, self._max_new_tokens = pair, max_new_tokens
        self._worker = Worker(pair, max_batch, max_waiting, memory_bytes, max_new_tokens, prefix_bytes)
        self._thread = threading.Thread(target=self._worker.run, name="c2c-engine", daemon=True)
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
        return [i for i in self._worker.lanes if i is not None]

    @property
    def receiver(self) -> str:
        """See `Engine`."""
        return self._pair.receiver.card.id

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
        self._check(request)
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
            job.cancelled = True
            self._worker.queue.discard(job)
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
                    job.cancelled = True
                    self._worker.queue.discard(job)
                    job.received.put_nowait(BusyError("the server has stopped before the answer was complete"))
        self._worker.queue.close()
        if self._thread.is_alive():
            await asyncio.to_thread(self._thread.join)

    def _check(self, request: Request) -> None:
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
