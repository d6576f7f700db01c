"""From requests that were admitted to answers that can be written: one prefill and fusion for all of them."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace

from transformers import DynamicCache

from cache2cache import inputs, plaintext
from cache2cache.chat import rewind
from cache2cache.crossing import crossing_bytes
from cache2cache.errors import RequestError
from cache2cache.inputs import Inputs, Row
from cache2cache.models import kv
from cache2cache.models.prefills import by_length
from cache2cache.pipeline import C2C, Prefill
from cache2cache.serve.engine import Usage
from cache2cache.serve.job import Answer, Job
from cache2cache.serve.lane import cut
from cache2cache.serve.prefix import Kept
from cache2cache.serve.tally import Tally
from cache2cache.types import Timings

_BATCH_TOKENS = 8192
"""Of one forward pass over prompts, padding included; a longer prompt is read alone."""


def tokenise(pair: C2C, job: Job, longest: int, timings: Timings, context: int | None = None) -> None:
    """Find out what a request reads, and how much it may write.

    Args:
        longest: most tokens that any request may write.
        context: tokens that there is room for, if that is less than the receiver's context.

    Raises:
        RequestError: nothing to read.
        ConversationError, TemplateError, AlignmentError, ContextLengthError: see `inputs.row`.
    """
    request, asked = job.request, job.request.sampling.max_tokens
    if isinstance(request.prompt, str):
        bos = pair.receiver.tokenizer.bos_token
        begin = not (bos and request.prompt.startswith(str(bos)))
        row = plaintext.row(pair, request.prompt, sorted(set(request.sharers)), begin=begin, timings=timings)
    else:
        (row,) = pair.rows([request.prompt], [list(request.sharers)], timings)
    if not len(row.ids):
        raise RequestError("the prompt has no tokens", allowed="at least one")
    context = min((n for n in (context, pair.receiver.card.geometry.max_positions) if n is not None), default=None)
    room = longest if context is None else min(longest, context - len(row.ids))
    job.limit = room if asked is None else asked
    inputs.check_length(pair.receiver, len(row.ids), max(job.limit, 1), context)
    job.row = row


def batches(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that are read together, since their prompts are about as long."""
    longest = [max([job.read.ids, *(part.ids for part in job.read.sharers if part)], key=len) for job in jobs]
    for batch in by_length(longest, _BATCH_TOKENS):
        yield [jobs[i] for i in batch]


def together(
    pair: C2C, jobs: Sequence[Job], ends: Collection[int], tally: Tally, *, keep: bool
) -> Iterator[tuple[list[Answer], Prefill]]:
    """As `fresh`, but one by one if that goes wrong or a sharer cannot be heard, so that only those suffer that are at
    fault: they get the error."""
    read = None
    try:
        with tally.timed() as timings:
            read = fresh(pair, jobs, ends, timings, keep=keep)
    except Exception as error:
        if len(jobs) == 1:
            jobs[0].send(error)
            return
    if read and not (read[1].degraded and len(jobs) > 1):
        yield read
        return
    for job in jobs:
        yield from together(pair, [job], ends, tally, keep=keep)


def fresh(
    pair: C2C, jobs: Sequence[Job], ends: Collection[int], timings: Timings, *, keep: bool
) -> tuple[list[Answer], Prefill]:
    """Read and fuse prompts in one batch, those that are asked more than once only once.

    Args:
        keep: give the answers copies of the sharers' caches.
    """
    order = {key: i for i, key in enumerate(dict.fromkeys(job.prompt_key() for job in jobs))}
    at = [order[job.prompt_key()] for job in jobs]
    rows = [jobs[at.index(i)].read for i in range(len(order))]
    prefill = pair.read(pair.collate(rows), timings=timings)
    answers = [_answer(pair, job, ends, rows[i], prefill, 0) for job, i in zip(jobs, at, strict=True)]
    if keep:
        caches = [_sharer_caches(prefill, i, row) for i, row in enumerate(rows)]
        for answer, i in zip(answers, at, strict=True):
            answer.sharer_caches = caches[i]
    if len(rows) < len(jobs):
        kv.select_rows(prefill.cache, at)
    return answers, replace(prefill, inputs=Inputs(prefill.ids[at], prefill.mask[at], ()), sharer_caches=[])


def unread(pair: C2C, job: Job, ends: Collection[int]) -> Answer:
    """An answer that hears nobody, and whose prompt is left to whoever writes it."""
    return Answer(job, pair.receiver.tokenizer, ends, Usage(len(job.read.ids), (), 0, 0))


def continued(pair: C2C, job: Job, kept: Kept, ends: Collection[int], timings: Timings) -> tuple[list[Answer], Prefill]:
    """Read and fuse what a prompt has beyond a conversation that was answered before."""
    last = kept.prefill
    prepared = rewind(last, kept.written, pair.collate([job.read]))
    cached = kv.length(last.cache)
    prefill = pair.read(prepared, resume=last, timings=timings)
    new = [
        None if part is None or batch is None else replace(part, due=batch.due[0].numpy())
        for part, batch in zip(job.read.sharers, prepared.sharers, strict=True)
    ]
    answer = _answer(pair, job, ends, Row(job.read.ids, tuple(new)), prefill, cached)
    answer.sharer_caches = _sharer_caches(prefill, 0, job.read)
    return [answer], prefill


def _answer(pair: C2C, job: Job, ends: Collection[int], row: Row, prefill: Prefill, cached: int) -> Answer:
    """An answer of which nothing is written.

    Args:
        row: of which only the positions that were fused for this request are due.
        cached: prompt tokens that an earlier request had read.
    """
    degraded = tuple(i for i in sorted(prefill.degraded) if row.sharers[i] is not None)
    heard = replace(row, sharers=tuple(None if i in degraded else part for i, part in enumerate(row.sharers)))
    read = tuple(len(part.ids) for part in heard.sharers if part is not None)
    usage = Usage(len(row.ids), read, cached, crossing_bytes(pair, heard))
    return Answer(job, pair.receiver.tokenizer, ends, usage, degraded)


def _sharer_caches(prefill: Prefill, row: int, read: Row) -> list[DynamicCache]:
    """Copies of what each sharer has read of one row; empty where it did not speak or keeps its cache to itself."""
    caches = []
    for part, batch, cache in zip(read.sharers, prefill.inputs.sharers, prefill.sharer_caches, strict=True):
        width = 0 if batch is None else batch.ids.shape[1]
        here = part is not None and kv.length(cache) == width
        caches.append(cut(cache, row, width - len(part.ids), width) if part is not None and here else kv.new_cache())
    return caches
