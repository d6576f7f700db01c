"""Clients that ask one after the other, and what they see: tokens per second, time to the first token, time per token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
from openai import AsyncOpenAI


@dataclass(frozen=True)
class Sample:
    """One streamed answer, as its client saw it. Moments are on one clock, in seconds."""

    asked: float
    first: float
    """The first text, or the end of an answer without any."""
    last: float
    tokens: int
    """Really written, as the server counts them; an answer may end before its limit."""


@dataclass(frozen=True)
class Spread:
    """Seconds."""

    mean: float
    p50: float
    p95: float
    p99: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> Spread | None:
        """Of some numbers; None if there are none. Percentiles are interpolated linearly."""
        if not seconds:
            return None
        p50, p95, p99 = (float(x) for x in np.percentile(seconds, (50, 95, 99)))
        return cls(float(np.mean(seconds)), p50, p95, p99)


@dataclass(frozen=True)
class Summary:
    """Of all answers to one load."""

    answers: int
    seconds: float
    """From the first request to the end of the last answer."""
    tokens: int
    tokens_per_second: float
    """Of all clients together."""
    answers_per_second: float
    decode_rate: float | None
    """Tokens per second of one stream after its first token; None if no answer has a second one."""
    first_token: Spread | None
    token: Spread | None
    """Time per token after the first, one number per answer that has a second one."""
    answer: Spread | None

    @classmethod
    def of(cls, samples: Sequence[Sample]) -> Summary:
        """Of at least one answer."""
        seconds = max(s.last for s in samples) - min(s.asked for s in samples)
        tokens = sum(s.tokens for s in samples)
        longer = [(s.last - s.first, s.tokens - 1) for s in samples if s.tokens > 1]
        decoding = sum(time for time, _ in longer)
        return cls(
            answers=len(samples),
            seconds=seconds,
            tokens=tokens,
            tokens_per_second=tokens / seconds,
            answers_per_second=len(samples) / seconds,
            decode_rate=sum(count for _, count in longer) / decoding if decoding else None,
            first_token=Spread.of([s.first - s.asked for s in samples]),
            token=Spread.of([time / count for time, count in longer]),
            answer=Spread.of([s.last - s.asked for s in samples]),
        )

    def json(self) -> dict:
        """As it is written to a file."""
        return asdict(self)


async def answer(client: AsyncOpenAI, model: str, prompt: str, limit: int) -> Sample:
    """One request, greedy and streamed.

    Args:
        limit: most tokens of the answer.
    """
    asked, first, last, tokens = time.perf_counter(), None, 0.0, 0
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": prompt}], temperature=0, max_tokens=limit,
        stream=True, stream_options={"include_usage": True},
    )  # fmt: skip
    async for chunk in stream:
        if chunk.choices:
            last = time.perf_counter()
            if first is None and chunk.choices[0].delta.content:
                first = last
        if chunk.usage is not None:
            tokens = chunk.usage.completion_tokens
    return Sample(asked, last if first is None else first, last, tokens)


async def closed_loop(
    ask: Callable[[str], Awaitable[Sample]],
    prompts: Iterator[str],
    *,
    concurrency: int,
    answers: int,
    seconds: float,
) -> list[Sample]:
    """Keep so many clients busy, each with one request at a time.

    Args:
        answers: most that are asked for.
        seconds: after which no further one is; those that are being written are waited for.
    """
    samples: list[Sample] = []
    left, end = iter(range(answers)), time.perf_counter() + seconds

    async def client() -> None:
        for _ in left:
            if time.perf_counter() >= end:
                return
            samples.append(await ask(next(prompts)))

    await asyncio.gather(*(client() for _ in range(concurrency)))
    return samples
