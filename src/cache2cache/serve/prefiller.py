"""Prefills of requests that arrive together, computed as one batch. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch

from cache2cache.errors import BusyError
from cache2cache.inputs import padded
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel, pad_id
from cache2cache.serve.payload import SharerCache, ids_digest
from cache2cache.serve.wire import Limits


@dataclass(frozen=True, eq=False)
class Wanted:
    """The prompts of one request, and what is wanted of them. Never torn apart: they are read in one batch."""

    prompts: Sequence[np.ndarray]
    """(M,) token ids each."""
    positions: Sequence[Sequence[int]]
    """Of each prompt, ascending."""
    layers: tuple[int, ...]
    """Ascending."""
    answer: asyncio.Future[list[SharerCache]] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )


Observe = Callable[[int, int, float], None]
"""(rows, real tokens, seconds) of a batch."""


class Prefiller:
    """One model, one thread, first come first served.

    While a batch is read the next one gathers, so that nobody waits for company. A request that is read by itself gets
    the bits that it would get in a process of its own; in company the last bits may differ, as in any batch.

    Args:
        limits: of a batch; every request must keep within them.
        max_waiting: most requests that wait.
    """

    def __init__(self, lm: LanguageModel, limits: Limits, max_waiting: int, observe: Observe):
        self._lm, self._limits, self._max_waiting, self._observe = lm, limits, max_waiting, observe
        self._waiting: deque[Wanted] = deque()
        self._arrived, self._idle = asyncio.Event(), asyncio.Event()
        self._draining = False
        self._thread = ThreadPoolExecutor(1, "c2c-sharer")
        self._task: asyncio.Task[None] | None = None
        self._batch_seconds = 1.0
        self.running = 0
        """Rows that are read now."""

    @property
    def waiting(self) -> int:
        """Requests that are not read yet."""
        return len(self._waiting)

    @property
    def ready(self) -> bool:
        """Whether new requests are read."""
        return self._task is not None and not self._task.done() and not self._draining

    async def start(self) -> None:
        """Begin to read, unless it has begun."""
        if self._task is None:
            self._task = asyncio.create_task(self._work())

    async def drain(self) -> None:
        """Take nothing new; returns once everything that was taken has been read."""
        self._draining = True
        await self._idle.wait()

    async def stop(self) -> None:
        """Read no more; those who still wait get a BusyError."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        for wanted in self._waiting:
            if not wanted.answer.done():
                wanted.answer.set_exception(BusyError("the sharer is about to stop"))
        self._thread.shutdown()

    async def read(self, wanted: Wanted) -> list[SharerCache]:
        """The caches of one request, one per prompt. Cancelled, it is not read if it still waits.

        Raises:
            BusyError: too many wait already.
        """
        if not self.ready:
            raise BusyError("the sharer is about to stop")
        if len(self._waiting) >= self._max_waiting:
            batches = 1 + len(self._waiting) // self._limits.rows
            raise BusyError(
                "the sharer is busy", got=f"{len(self._waiting)} requests that wait", allowed=self._max_waiting,
                retry_after=batches * self._batch_seconds,
            )  # fmt: skip
        self._waiting.append(wanted)
        self._arrived.set()
        self._idle.clear()
        try:
            return await wanted.answer
        finally:
            if wanted in self._waiting:
                self._waiting.remove(wanted)

    async def _work(self) -> None:
        while True:
            if batch := self._next():
                await self._answer(batch)
            else:
                self._arrived.clear()
                self._idle.set()
                await self._arrived.wait()

    def _next(self) -> list[Wanted]:
        """Those who have waited longest, as many as fit into one batch. Nobody is overtaken."""
        batch: list[Wanted] = []
        rows = width = 0
        while self._waiting:
            first = self._waiting[0]
            if first.answer.cancelled():
                self._waiting.popleft()
                continue
            rows, width = rows + len(first.prompts), max(width, *map(len, first.prompts))
            if batch and (rows > self._limits.rows or rows * width > self._limits.tokens):
                break
            batch.append(self._waiting.popleft())
        return batch

    async def _answer(self, batch: Sequence[Wanted]) -> None:
        begun = time.perf_counter()
        self.running = sum(len(wanted.prompts) for wanted in batch)
        try:
            answers = await asyncio.get_running_loop().run_in_executor(self._thread, self._prefill, batch)
        except asyncio.CancelledError:
            for wanted in batch:
                if not wanted.answer.done():
                    wanted.answer.set_exception(BusyError("the sharer is about to stop"))
            raise
        except Exception as error:
            if len(batch) > 1:  # so that only those fail that are at fault
                for wanted in batch:
                    await self._answer([wanted])
            elif not batch[0].answer.done():
                batch[0].answer.set_exception(error)
            return
        finally:
            self.running = 0
        seconds = time.perf_counter() - begun
        self._batch_seconds += 0.2 * (seconds - self._batch_seconds)
        prompts = [ids for wanted in batch for ids in wanted.prompts]
        self._observe(len(prompts), sum(map(len, prompts)), seconds)
        for wanted, caches in zip(batch, answers, strict=True):
            if not wanted.answer.done():
                wanted.answer.set_result(caches)

    def _prefill(self, batch: Sequence[Wanted]) -> list[list[SharerCache]]:
        lm = self._lm
        ids, mask = padded([ids for wanted in batch for ids in wanted.prompts], pad_id(lm))
        cache = kv.prefill(lm.model, ids.to(lm.device), mask.to(lm.device))
        answers, row = [], 0
        for wanted in batch:
            caches = []
            for prompt, positions in zip(wanted.prompts, wanted.positions, strict=True):
                at = torch.tensor(positions)
                columns = (at + ids.shape[1] - len(prompt)).to(lm.device)
                sides = zip(*(kv.layer_tensors(cache, layer) for layer in wanted.layers), strict=True)
                held = torch.stack([torch.stack([x[row][:, columns] for x in side]) for side in sides]).cpu()
                caches.append(SharerCache(lm.card, ids_digest(prompt), len(prompt), at, wanted.layers, held))
                row += 1
            answers.append(caches)
        return answers
