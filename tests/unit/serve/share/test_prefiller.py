"""Who is read with whom, and when."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import numpy as np
import pytest
import torch

from cache2cache.errors import BusyError
from cache2cache.models import kv
from cache2cache.serve.prefiller import Prefiller, Wanted
from cache2cache.serve.wire import Limits


class Watched:
    """A prefiller and the batches that it has read, as (rows, tokens)."""

    def __init__(self, lm, *, rows: int = 4, tokens: int = 100, waiting: int = 10):
        self.batches: list[tuple[int, int]] = []
        limits = Limits(rows=rows, tokens=tokens)
        self.prefiller = Prefiller(lm, limits, waiting, lambda rows, tokens, _: self.batches.append((rows, tokens)))

    async def __aenter__(self) -> Watched:
        await self.prefiller.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.prefiller.stop()

    def ask(self, *prompts: Sequence[int], layers: tuple[int, ...] = (0,)) -> asyncio.Task:
        read = [np.array(ids) for ids in prompts]
        return asyncio.create_task(self.prefiller.read(Wanted(read, [range(len(ids)) for ids in read], layers)))


def test_those_who_come_together_are_read_together_and_nobody_is_overtaken(sharer):
    async def run() -> list[tuple[int, int]]:
        async with Watched(sharer, rows=4, tokens=12) as watched:
            await asyncio.gather(
                watched.ask([1, 2, 3], [4]),
                watched.ask([5]),  # 3 rows × 3
                watched.ask([1] * 10),  # 4 rows × 10 are too many tokens: the next batch
                watched.ask([6]),  # 2 × 10 as well: waits, though it would have fitted into the first one
                watched.ask([7], [8], [9], [1]),  # 5 rows are too many
            )
            return watched.batches

    assert asyncio.run(run()) == [(3, 5), (1, 10), (1, 1), (4, 4)]


def test_each_gets_their_own(sharer):
    prompts = [[5, 6, 7, 8], [9, 10], [11]]

    async def run():
        async with Watched(sharer) as watched:
            first, second = await asyncio.gather(
                watched.ask(*prompts[:2], layers=(0, 2)), watched.ask(prompts[2], layers=(1,))
            )
            assert watched.batches == [(3, 7)]
            return [*first, *second]

    for cache, ids in zip(asyncio.run(run()), prompts, strict=True):
        cache.matches(sharer.card, ids)
        alone = kv.stack(kv.prefill(sharer.model, torch.tensor([ids]), torch.ones(1, len(ids))))[:, :, 0]
        torch.testing.assert_close(cache.kv, alone[:, list(cache.layers)], rtol=1e-4, atol=1e-4)


def test_a_full_queue(sharer):
    async def run():
        async with Watched(sharer, waiting=2) as watched:
            answers = await asyncio.gather(*(watched.ask([i]) for i in range(4)), return_exceptions=True)
            assert watched.batches == [(2, 2)]
            return answers

    *read, first, second = asyncio.run(run())
    assert [len(caches) for caches in read] == [1, 1]
    for error in (first, second):
        assert isinstance(error, BusyError)
        assert error.retry_after > 0


def test_whoever_leaves_while_waiting_is_not_read(sharer):
    async def run() -> list[tuple[int, int]]:
        async with Watched(sharer) as watched:
            gone, stays = watched.ask([1, 2, 3]), watched.ask([4])
            await asyncio.sleep(0)
            gone.cancel()
            await stays
            with pytest.raises(asyncio.CancelledError):
                await gone
            return watched.batches

    assert asyncio.run(run()) == [(1, 1)]


def test_only_those_at_fault_fail(sharer):
    async def run():
        async with Watched(sharer) as watched:
            good, bad, fine = watched.ask([1]), watched.ask([2], layers=(99,)), watched.ask([3])
            return await asyncio.gather(good, bad, fine, return_exceptions=True)

    good, bad, fine = asyncio.run(run())
    assert isinstance(bad, IndexError)
    assert len(good) == len(fine) == 1


def test_draining_finishes_what_was_taken_and_takes_nothing_new(sharer):
    async def run():
        async with Watched(sharer, rows=1) as watched:
            taken = [watched.ask([i]) for i in range(3)]
            await asyncio.sleep(0)
            draining = asyncio.create_task(watched.prefiller.drain())
            await asyncio.sleep(0)
            assert not watched.prefiller.ready
            with pytest.raises(BusyError, match="about to stop"):
                await watched.ask([9])
            await draining
            assert [len(await task) for task in taken] == [1, 1, 1]
            assert watched.prefiller.waiting == watched.prefiller.running == 0

    asyncio.run(run())


def test_stopping_tells_those_who_wait(sharer):
    async def run():
        watched = Watched(sharer, rows=1)
        async with watched:
            waiting = [watched.ask([i]) for i in range(3)]
            await asyncio.sleep(0)
        answers = await asyncio.gather(*waiting, return_exceptions=True)
        assert all(isinstance(answer, BusyError) for answer in answers)
        with pytest.raises(BusyError):
            await watched.ask([1])

    asyncio.run(run())
