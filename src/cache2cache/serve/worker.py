"""The embedded engine's thread: admits, reads, writes, and lets go."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C, Prefill
from cache2cache.serve import reading
from cache2cache.serve.admission import Budget, Limits, Queue
from cache2cache.serve.engine import Load
from cache2cache.serve.job import Answer, Job
from cache2cache.serve.lane import Lane
from cache2cache.serve.prefix import Kept, PrefixCache
from cache2cache.serve.tally import Tally
from cache2cache.types import clock

_TURN = 16
"""Tokens that a model writes before another one, of which answers are wanted as well, has its turn."""

Admitted = dict[int | None, list[Job]]
"""Jobs by who answers."""


class Worker:
    """Everything that touches models and tokenizers, which are not made for several threads."""

    def __init__(self, pair: C2C, limits: Limits, prefix_bytes: int):
        alone = {i: Lane(C2C(lm)) for i, lm in enumerate(pair.sharers) if isinstance(lm, LanguageModel)}
        self.lanes: dict[int | None, Lane] = {None: Lane(pair), **alone}
        """Batches by who answers: the receiver, or a sharer by itself."""
        self.queue = Queue(limits.max_waiting)
        self._limits = limits
        self._prefixes = PrefixCache(prefix_bytes)
        self._budget = Budget(limits.memory_bytes, keep=prefix_bytes > 0)
        self._tally = Tally()

    def run(self) -> None:
        """Work until the queue is closed."""
        while self.queue.wait(idle=not self._running()):
            for alone, jobs in self._admitted().items():
                with self._guarded(self.lanes[alone], jobs):
                    self._read(self.lanes[alone], jobs)
            for lane in self.lanes.values():
                with self._guarded(lane):
                    self._write(lane)

    def load(self) -> Load:
        """How busy it is; may be asked from another thread."""
        held = self._running_bytes() + self._prefixes.bytes
        return Load(len(self.queue), self._running(), held, dict(self._tally.sums))

    def retry_after(self) -> float:
        """Seconds until those who wait now have been answered, about; likewise."""
        return self._tally.retry_after(len(self.queue), self._limits.max_batch)

    # --- admission ------------------------------------------------------------------------------------------------

    def _admitted(self) -> Admitted:
        """Those who have waited longest, as far as there is room."""
        self.queue.news = False
        admitted: Admitted = {alone: [] for alone in self.lanes}
        free = self._limits.max_batch - self._running()
        while free and (job := self.queue.first()):
            alone = job.request.alone
            try:
                fits = self._fits(job, {**admitted, alone: [*admitted[alone], job]})
            except Exception as error:  # whatever a prompt does to a tokenizer or a template is its sender's to know
                job.send(error)
                self.queue.discard(job)
                continue
            if not fits:
                break
            self.queue.discard(job)
            admitted[alone].append(job)
            free -= 1
        return admitted

    def _fits(self, job: Job, admitted: Admitted) -> bool:
        """Whether there is room for those who run and those who are admitted, `job` among them."""
        pair = self.lanes[job.request.alone].pair
        if job.row is None:
            with self._tally.timed() as timings:
                reading.tokenise(pair, job, self._limits.max_new_tokens, timings)
        least = self._budget.running(pair, [job]) + self._budget.reading(pair, [job])
        self._budget.check(least, "Shorten the conversation or ask for fewer tokens")
        reads = sum(self._budget.reading(self.lanes[alone].pair, jobs) for alone, jobs in admitted.items())
        return self._budget.fits(self._running_bytes(admitted) + reads)

    def _running(self) -> int:
        return sum(len(lane.answers) for lane in self.lanes.values())

    def _running_bytes(self, more: Admitted | None = None) -> int:
        more = more or {}
        batches = ((lane, [a.job for a in lane.answers] + more.get(alone, [])) for alone, lane in self.lanes.items())
        return sum(self._budget.running(lane.pair, jobs) for lane, jobs in batches)

    # --- reading --------------------------------------------------------------------------------------------------

    def _read(self, lane: Lane, jobs: Sequence[Job]) -> None:
        """Let jobs join a batch: those that go on with a kept conversation one by one, the others together."""
        others = []
        for job in jobs:
            if kept := self._prefixes.find(job.request):
                self._tally.sums["prefix_hits"] += 1
                self._continue(lane, job, kept)
            else:
                others.append(job)
        keep = self._prefixes.limit > 0
        for batch in reading.batches(others):
            for answers, prefill in reading.together(lane.pair, batch, lane.ends, self._tally, keep=keep):
                self._join(lane, answers, prefill)

    def _continue(self, lane: Lane, job: Job, kept: Kept) -> None:
        try:
            with self._tally.timed() as timings:
                answers, prefill = reading.continued(lane.pair, job, kept, lane.ends, timings)
        except Exception as error:
            job.send(error)
            return
        self._join(lane, answers, prefill)

    def _join(self, lane: Lane, answers: Sequence[Answer], prefill: Prefill) -> None:
        lane.join(answers, prefill)
        for answer in answers:
            self._tally.begun(answer)

    # --- writing --------------------------------------------------------------------------------------------------

    def _write(self, lane: Lane) -> None:
        """One call of `generate`, after which those who are done leave."""
        if not lane.answers:
            return
        others, before = self._running() > len(lane.answers), sum(len(a.written) for a in lane.answers)

        def enough(tokens: int) -> bool:
            left = any(answer.done for answer in lane.answers)
            admits = left or (self.queue.news and self._running() < self._limits.max_batch)
            return (others and tokens >= _TURN) or (admits and len(self.queue) > 0)

        with self._tally.timed() as timings, clock(timings, "decode"):
            lane.write(enough)
        self._tally.sums["tokens_generated"] += sum(len(a.written) for a in lane.answers) - before
        for row, answer in enumerate(lane.answers):
            if answer.finish:
                self._answered(lane, row, answer)
        lane.leave()

    def _answered(self, lane: Lane, row: int, answer: Answer) -> None:
        self._tally.ended(answer)
        request = answer.job.request
        # What was to be heard and was not would be missing in all later turns.
        if self._prefixes.limit and not answer.degraded and not isinstance(request.prompt, str):
            read = lane.pair.collate([answer.job.read])
            prefill = Prefill(read, lane.cache_of(row), answer.sharer_caches)
            self._prefixes.keep(request, answer.text, Kept(prefill, answer.written))

    @contextmanager
    def _guarded(self, lane: Lane, jobs: Sequence[Job] = ()) -> Iterator[None]:
        """Whatever goes wrong with a batch ends all of its answers; the thread lives on."""
        try:
            yield
        except Exception as error:
            for job in (*jobs, *(answer.job for answer in lane.answers)):
                job.send(error)
            lane.clear()
