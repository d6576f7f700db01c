from __future__ import annotations

import asyncio
import pickle
import threading

import numpy as np
import pytest

from cache2cache.errors import BusyError
from cache2cache.inputs import Row, SharerRow
from cache2cache.pipeline import C2C
from cache2cache.serve.admission import Budget, Queue, per_position
from cache2cache.serve.engine import Request
from cache2cache.serve.job import Job


def job(prompt: int = 1, limit: int = 1, sharer: int | None = None) -> Job:
    made = Job(Request("r", "text", ()), asyncio.new_event_loop())
    made.loop.close()
    part = None if sharer is None else SharerRow(*np.zeros((3, sharer), np.int64))
    made.row, made.limit = Row(np.zeros(prompt, np.int64), (part,)), limit
    return made


class TestQueue:
    def test_is_first_come_first_served(self):
        queue, jobs = Queue(3), [job() for _ in range(3)]
        for one in jobs:
            queue.put(one, 1.0)
        queue.discard(jobs[1])
        left = []
        while first := queue.first():
            left.append(first)
            queue.discard(first)
        assert left == [jobs[0], jobs[2]]

    def test_is_bounded(self):
        queue = Queue(1)
        queue.put(job(), 1.0)
        with pytest.raises(BusyError, match="the queue is full; got 1 requests") as caught:
            queue.put(job(), 7.0)
        assert caught.value.retry_after == 7.0
        assert len(queue) == 1

    def test_discards_who_is_gone_already(self):
        queue = Queue(1)
        queue.discard(job())
        assert queue.first() is None

    def test_tells_of_news(self):
        queue = Queue(1)
        assert not queue.news
        queue.put(job(), 1.0)
        assert queue.news

    @pytest.mark.parametrize(("act", "open_"), [(lambda q: q.put(job(), 1.0), True), (Queue.close, False)])
    def test_wakes_who_is_idle(self, act, open_):
        queue, woken = Queue(1), []
        thread = threading.Thread(target=lambda: woken.append(queue.wait(idle=True)))
        thread.start()
        act(queue)
        thread.join(10)
        assert woken == [open_]

    def test_does_not_wait_for_who_is_busy(self):
        assert Queue(1).wait(idle=False)


def test_a_busy_error_survives_pickling():
    error = pickle.loads(pickle.dumps(BusyError("full", got=1, allowed=2, hint="later", retry_after=3.5)))
    assert (str(error), error.retry_after) == (str(BusyError("full", got=1, allowed=2, hint="later")), 3.5)


def test_a_job_whose_loop_is_closed_is_cancelled():
    one = job()
    one.send(RuntimeError("unheard"))
    assert one.cancelled


class TestBudget:
    def test_counts_a_position_as_the_cache_holds_it(self, receiver, sharer):
        # Layers × (keys, values) × heads × head size × 4 bytes.
        assert per_position(receiver) == 2 * 2 * 2 * 16 * 4
        assert per_position(sharer) == 3 * 2 * 2 * 8 * 4

    def test_counts_all_rows_as_wide_as_the_widest(self, receiver, sharer, fuser):
        pair, budget = C2C(receiver, [sharer], [fuser]), Budget(None, keep=False)
        rows = [job(prompt=10, limit=5, sharer=8), job(prompt=3, limit=20, sharer=11), job(prompt=1, limit=1)]
        assert budget.running(pair, rows) == 3 * 22 * per_position(receiver)
        assert budget.reading(pair, rows) == 3 * 11 * per_position(sharer)
        assert Budget(None, keep=True).running(pair, rows) == budget.running(pair, rows) + budget.reading(pair, rows)
        assert budget.running(pair, []) == budget.reading(pair, []) == 0

    @pytest.mark.parametrize(("limit", "fits"), [(None, True), (100, True), (99, False)])
    def test_fits(self, limit, fits):
        assert Budget(limit, keep=False).fits(100) is fits
