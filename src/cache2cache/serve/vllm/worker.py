"""What reads for vLLM: prompts that hear a sharer are read and fused here, in batches, and their caches handed over."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cache2cache.decoding import end_tokens
from cache2cache.pipeline import C2C, Prefill
from cache2cache.serve import reading
from cache2cache.serve.admission import Budget, Limits, Queue, per_position
from cache2cache.serve.engine import Load
from cache2cache.serve.job import Answer, Job
from cache2cache.serve.payload import ids_digest
from cache2cache.serve.tally import Tally
from cache2cache.serve.vllm.store import Store

Hand = Callable[[Answer, str | None], None]
"""Takes an answer that can be written, and the name of its fused cache if it has one."""


class PrefillWorker:
    """Everything that touches models and tokenizers here, in a thread of its own.

    Args:
        hand: called in that thread.
        limits: memory is that of fused caches on their way, as files and while they are computed.
    """

    def __init__(self, pair: C2C, store: Store, hand: Hand, limits: Limits):
        self.queue = Queue(limits.max_waiting)
        self.tally = Tally()
        self.ends = end_tokens(pair.receiver)
        """Tokens that end an answer."""
        self.context: int | None = None
        """Tokens of prompt and answer that vLLM has room for, if that is less than the model's context."""
        self._pair, self._store, self._hand = pair, store, hand
        self._limits = limits
        self._budget = Budget(limits.memory_bytes, keep=False)
        self._running: dict[Job, int] = {}  # bytes of their files
        self._gone = 0
        self._full_since: int | None = None  # value of _gone when there was no room for the next

    def run(self) -> None:
        """Work until the queue is closed."""
        while self.queue.wait(idle=True, room=lambda: self._full_since != self._gone):
            jobs = self._admitted()
            try:
                self._read(jobs)
            except Exception as error:
                for job in jobs:
                    job.send(error)
                    self.leave(job)

    def leave(self, job: Job) -> None:
        """An answer has ended; called in another thread."""
        if self._running.pop(job, None) is not None:
            self._gone += 1
            self.queue.wake()

    def load(self) -> Load:
        """How busy it is; may be asked from another thread."""
        return Load(len(self.queue), len(self._running), self._held(), dict(self.tally.sums))

    def retry_after(self) -> float:
        """Seconds until those who wait now have been answered, about; likewise."""
        return self.tally.retry_after(len(self.queue), self._limits.max_batch)

    def _held(self) -> int:
        return sum(list(self._running.values()))

    # --- admission ------------------------------------------------------------------------------------------------

    def _admitted(self) -> list[Job]:
        """Those who have waited longest, as far as there is room."""
        jobs: list[Job] = []
        gone, full = self._gone, False
        while not full and (job := self.queue.first()):
            try:
                full = len(self._running) >= self._limits.max_batch or not self._fits([*jobs, job])
            except Exception as error:  # whatever a prompt does to a tokenizer or a template is its sender's to know
                job.send(error)
                self.queue.discard(job)
                continue
            if not full:
                self.queue.discard(job)
                self._running[job] = self._file(job)
                jobs.append(job)
        # Once those who were admitted have been read, there may be room that reading takes now.
        self._full_since = gone if full and not jobs else None
        return jobs

    def _fits(self, jobs: Sequence[Job]) -> bool:
        """Whether there is room for the last of these, the others being admitted."""
        if jobs[-1].row is None:
            with self.tally.timed() as timings:
                reading.tokenise(self._pair, jobs[-1], self._limits.max_new_tokens, timings, self.context)
        least = self._reading(jobs[-1:]) + self._file(jobs[-1])
        self._budget.check(least, "Shorten the conversation")
        return self._budget.fits(self._held() + self._file(jobs[-1]) + self._reading(jobs))

    def _file(self, job: Job) -> int:
        """Bytes of a job's fused cache."""
        return (len(job.read.ids) - 1) * per_position(self._pair.receiver) if _hears(job) else 0

    def _reading(self, jobs: Sequence[Job]) -> int:
        """Bytes of all models' caches while these are read."""
        hearing = [job for job in jobs if _hears(job)]
        own = max((self._file(job) for job in hearing), default=0)
        return len(hearing) * own + self._budget.reading(self._pair, hearing)

    # --- reading --------------------------------------------------------------------------------------------------

    def _read(self, jobs: Sequence[Job]) -> None:
        """Hand over: those who hear nobody as they are, the others with their fused caches."""
        for job in jobs:
            if not _hears(job):
                self._hand(reading.unread(self._pair, job, self.ends), None)
        for batch in reading.batches([job for job in jobs if _hears(job)]):
            handed = set()
            for answers, prefill in reading.together(self._pair, batch, self.ends, self.tally, keep=False):
                self._store_and_hand(answers, prefill)
                handed |= {answer.job for answer in answers}
            for job in set(batch) - handed:  # they have been told why
                self.leave(job)

    def _store_and_hand(self, answers: Sequence[Answer], prefill: Prefill) -> None:
        stored: dict[str, str] = {}
        for row, answer in enumerate(answers):
            ids, key = answer.job.read.ids, answer.job.prompt_key()
            if len(ids) == 1:
                name = None
            elif key in stored:
                name = self._store.share(stored[key])
            else:
                start = prefill.ids.shape[1] - len(ids)
                name = stored[key] = self._store.put(prefill.cache, row, start, ids_digest(ids))
            self._hand(answer, name)


def _hears(job: Job) -> bool:
    return any(part is not None for part in job.read.sharers)
