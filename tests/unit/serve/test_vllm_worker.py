"""What reads for vLLM: every prompt's cache is the one it gets alone, and room is kept for those that wait."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from cache2cache.errors import AlignmentError, ContextLengthError, ConversationError, RequestError
from cache2cache.fuser.base import Fuser
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.serve.admission import Limits, per_position
from cache2cache.serve.engine import Request, Sampling
from cache2cache.serve.job import Answer, Job
from cache2cache.serve.payload import ids_digest
from cache2cache.serve.vllm.store import Store, salt
from cache2cache.serve.vllm.worker import PrefillWorker

TEXTS = ("hi", "What is the answer to the question?", "a" * 60)


@pytest.fixture(scope="module")
def c2c(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> C2C:
    return C2C(receiver, [sharer], [fuser])


class Handed:
    """A worker, and what it has handed over."""

    def __init__(self, pair: C2C, folder: Path, **limits: Any):
        self.store = Store(folder)
        self.got: dict[Job, tuple[Answer, str | None]] = {}
        self.changed = threading.Condition()
        self.loop = asyncio.new_event_loop()
        self.worker = PrefillWorker(
            pair, self.store, self.hand, Limits(**{"max_batch": 8, "max_waiting": 8, "max_new_tokens": 16, **limits})
        )
        self.thread = threading.Thread(target=self.worker.run)

    def hand(self, answer: Answer, name: str | None) -> None:
        with self.changed:
            self.got[answer.job] = answer, name
            self.changed.notify_all()

    def job(self, text: str | list = TEXTS[1], sharers: Sequence[int] = (0,), max_tokens: int | None = 4) -> Job:
        messages: Any = [{"role": "user", "content": text}] if isinstance(text, str) else text
        request = Request("r", messages, tuple(sharers), sampling=Sampling(max_tokens=max_tokens))
        job = Job(request, self.loop)
        self.worker.queue.put(job, 1.0)
        return job

    def names(self, *jobs: Job) -> list[str | None]:
        with self.changed:
            assert self.changed.wait_for(lambda: all(job in self.got for job in jobs), 20)
        return [self.got[job][1] for job in jobs]

    def error(self, job: Job) -> Exception:
        item = self.loop.run_until_complete(asyncio.wait_for(job.received.get(), 20))
        assert isinstance(item, Exception)
        return item


@pytest.fixture
def start(c2c: C2C, tmp_path: Path) -> Iterator[Any]:
    begun: list[Handed] = []

    def make(pair: C2C = c2c, **limits: Any) -> Handed:
        begun.append(Handed(pair, tmp_path / str(len(begun)), **limits))
        return begun[-1]

    yield make
    for handed in begun:
        handed.worker.queue.close()
        if handed.thread.is_alive():
            handed.thread.join()
        handed.loop.close()


def fused(store: Store, name: str | None) -> torch.Tensor:
    """(2, L, H, P, D)"""
    assert name is not None
    with store.open(name) as file:
        both = [file.read(i, range(file.kv_heads), range(file.positions)) for i in range(file.layers)]
    return torch.stack([torch.stack([x.transpose(0, 1) for x in side]) for side in zip(*both, strict=True)])


def test_every_cache_is_the_one_that_its_prompt_gets_alone(start: Any, c2c: C2C):
    handed = start()
    jobs = [handed.job(text) for text in TEXTS]
    handed.thread.start()
    for job, name in zip(jobs, handed.names(*jobs), strict=True):
        expected = kv.stack(c2c.prefill([job.request.prompt]).cache)[:, :, 0]  # type: ignore[list-item]
        torch.testing.assert_close(fused(handed.store, name), expected, rtol=1e-4, atol=1e-4)
        with handed.store.open(str(name)) as file:
            assert file.digest == ids_digest(job.read.ids)
        usage = handed.got[job][0].usage
        assert usage.prompt_tokens == len(job.read.ids)
        assert usage.cache_bytes > 0
        assert len(usage.sharer_tokens) == 1


def test_a_prompt_that_is_asked_twice_is_fused_once(start: Any):
    handed = start()
    jobs = [handed.job(text) for text in (TEXTS[0], TEXTS[1], TEXTS[0])]
    handed.thread.start()
    first, other, again = map(str, handed.names(*jobs))
    assert first != again
    assert salt(first) == salt(again) != salt(other)
    assert torch.equal(fused(handed.store, first), fused(handed.store, again))


def test_who_hears_nobody_is_handed_on_unread(start: Any):
    handed = start()
    job = handed.job(sharers=())
    handed.thread.start()
    assert handed.names(job) == [None]
    usage = handed.got[job][0].usage
    assert (usage.prompt_tokens, usage.sharer_tokens, usage.cache_bytes) == (len(job.read.ids), (), 0)
    assert list(handed.store.folder.iterdir()) == []


@pytest.mark.parametrize(
    ("bad", "error"),
    [
        ({"text": []}, ConversationError),
        ({"text": [{"role": "robot", "content": "hi"}]}, ConversationError),
        ({"text": "a" * 600}, ContextLengthError),
        ({"max_tokens": 500}, ContextLengthError),
    ],
)
def test_those_that_cannot_be_read_and_the_others(start: Any, bad: dict[str, Any], error: type[Exception]):
    handed = start()
    good, other = handed.job(), handed.job(**bad)
    handed.thread.start()
    handed.names(good)
    assert isinstance(handed.error(other), error)
    assert handed.worker.load().running == 1


def test_less_room_than_the_models_context(start: Any):
    handed = start(max_new_tokens=100)
    handed.worker.context = 60
    short, long, open_ended = handed.job("hi"), handed.job("a" * 50), handed.job("hi", max_tokens=None)
    handed.thread.start()
    handed.names(short, open_ended)
    assert isinstance(handed.error(long), ContextLengthError)
    assert open_ended.limit == 60 - len(open_ended.read.ids)


@pytest.mark.parametrize("beyond", [0, 100])
def test_no_room_for_an_answer_of_any_length(start: Any, c2c: C2C, beyond: int):
    handed = start()
    frame = len(c2c.rows([[{"role": "user", "content": ""}]])[0].ids)
    handed.worker.context = 60
    job = handed.job("a" * (60 - frame + beyond), max_tokens=None)
    handed.thread.start()
    assert f"got {60 + beyond} tokens and 1 to be written; allowed: 60 together" in str(handed.error(job))


def test_if_a_batch_goes_wrong_only_the_culprit_suffers(start: Any, c2c: C2C, monkeypatch: pytest.MonkeyPatch):
    handed, read = start(), c2c.read
    jobs = [handed.job(text) for text in TEXTS]

    def fails_on_long_prompts(prepared: Any, **options: Any) -> Any:
        if prepared.ids.shape[1] > 70:
            raise AlignmentError("too long for this test")
        return read(prepared, **options)

    monkeypatch.setattr(c2c, "read", fails_on_long_prompts)
    handed.thread.start()
    handed.names(*jobs[:2])
    assert isinstance(handed.error(jobs[2]), AlignmentError)
    assert handed.worker.load().running == 2


def test_a_full_disk_is_told_to_those_who_asked(start: Any, monkeypatch: pytest.MonkeyPatch):
    handed = start()

    def full(*_: Any) -> str:
        raise OSError("No space left on device")

    monkeypatch.setattr(handed.store, "put", full)
    job = handed.job()
    handed.thread.start()
    assert "No space" in str(handed.error(job))
    monkeypatch.undo()
    handed.names(handed.job())
    assert handed.worker.load().running == 1


class TestRoom:
    def test_for_so_many_at_a_time(self, start: Any):
        handed = start(max_batch=2)
        jobs = [handed.job("hi") for _ in range(3)]
        handed.thread.start()
        handed.names(*jobs[:2])
        assert (handed.worker.load().waiting, handed.worker.load().running) == (1, 2)
        handed.worker.leave(jobs[0])
        handed.names(jobs[2])
        assert (handed.worker.load().waiting, handed.worker.load().running) == (0, 2)

    def test_for_so_many_bytes(self, start: Any, c2c: C2C):
        handed = start()
        job = handed.job()
        handed.thread.start()
        handed.names(job)
        held = handed.worker.load().cache_bytes
        assert held == (len(job.read.ids) - 1) * per_position(c2c.receiver)
        # Room for one file and one that is read, but not for a third.
        sharer = job.sharer_positions(0) * per_position(c2c.sharers[0])
        tight = start(memory_bytes=3 * held + sharer)
        jobs = [tight.job() for _ in range(3)]
        tight.thread.start()
        tight.names(*jobs[:2])
        assert (tight.worker.load().waiting, tight.worker.load().cache_bytes) == (1, 2 * held)
        tight.worker.leave(jobs[0])
        tight.names(jobs[2])

    def test_never_for_what_is_larger_than_all_of_it(self, start: Any):
        handed = start(memory_bytes=1000)
        job, small = handed.job(), handed.job(sharers=())
        handed.thread.start()
        assert isinstance(handed.error(job), RequestError)
        assert handed.names(small) == [None]

    def test_that_is_left_twice_counts_once(self, start: Any):
        handed = start()
        job = handed.job()
        handed.thread.start()
        handed.names(job)
        handed.worker.leave(job)
        handed.worker.leave(job)
        assert (handed.worker.load().running, handed.worker.load().cache_bytes) == (0, 0)
