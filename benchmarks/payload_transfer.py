"""One request side by side: what the sharer knows as a cache in every precision, and as text."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

from payload_service import Line, Service, listen

from cache2cache.evaluate.systems import MESSAGE_PROMPT, with_last
from cache2cache.pipeline import C2C
from cache2cache.serve.payload import Precision
from cache2cache.types import Conversation, Generation

_ANSWER = {"do_sample": False, "min_new_tokens": 8, "max_new_tokens": 8}

Way = Callable[[], dict[str, float]]
"""Does it once; seconds by stage, and bytes."""


def transfers(
    pair: C2C, asked: Conversation, precisions: Sequence[Precision], messages: Sequence[int], repeat: int
) -> list[dict[str, Any]]:
    """Bytes and median seconds of each way, from messages to an answer of eight tokens.

    Args:
        messages: tokens of a text.
    """
    with Line() as line:
        ways: dict[str, tuple[Way, int]] = {}
        for precision in precisions:
            for compress in (False, True):
                name = f"{precision}{', zstd' if compress else ''}"
                ways[name] = as_cache(pair, asked, line, precision, compress), repeat
        for size in messages:
            ways[f"text, {size} tokens"] = as_text(pair, asked, line, size), 1
        return [{"way": name} | _median(way, times) for name, (way, times) in ways.items()]


def as_cache(pair: C2C, asked: Conversation, line: Line, precision: Precision, compress: bool) -> Way:
    """The sharer reads; what will be fused is encoded, sent and decoded; the receiver reads, fuses and answers."""
    size = 0

    def carry(data: bytes) -> bytes:
        nonlocal size
        size = len(data)
        line.send(data)
        return data

    service = Service(pair.sharers[0], carry=carry)
    remote = listen(service, pair.sharers[0], precision=precision, compress=compress)
    apart = C2C(pair.receiver, [remote], pair.fusers)

    def once() -> dict[str, float]:
        service.seconds.clear()
        begun = time.perf_counter()
        timings = _answer(apart, asked, **_ANSWER).timings
        total, there = time.perf_counter() - begun, dict(service.seconds)
        return {
            "bytes": size,
            "sharer reads": there["read"],
            "encode": there["encode"],
            "transfer": there["transfer"],
            "decode": timings.sharer_prefill - sum(there.values()),
            "receiver reads": timings.receiver_prefill,
            "fuse": timings.fuse,
            "answer": timings.decode,
            "total": total,
        }

    return once


def as_text(pair: C2C, asked: Conversation, line: Line, size: int) -> Way:
    """The sharer writes so many tokens; they are sent; the receiver reads them before the question and answers."""
    writer = C2C(pair.sharers[0])
    request = with_last(asked, MESSAGE_PROMPT.format(topic=asked[-1]["content"]))

    def once() -> dict[str, float]:
        begun = time.perf_counter()
        written = _answer(writer, request, do_sample=False, min_new_tokens=size, max_new_tokens=size)
        sent, data = time.perf_counter(), written.text.encode()
        line.send(data)
        arrived = time.perf_counter()
        told = with_last(asked, f"{written.text}\n\n{asked[-1]['content']}")
        answered = _answer(pair, told, sharers=[], **_ANSWER)
        return {
            "bytes": len(data),
            "sharer reads": written.timings.receiver_prefill,
            "sharer writes": written.timings.decode,
            "transfer": arrived - sent,
            "receiver reads": answered.timings.receiver_prefill,
            "answer": answered.timings.decode,
            "total": time.perf_counter() - begun,
        }

    return once


def _answer(pair: C2C, asked: Conversation, **options: Any) -> Generation:
    answer = pair.generate(asked, **options)
    assert not isinstance(answer, list)
    return answer


def _median(way: Way, times: int) -> dict[str, float]:
    """Of several times after a warm-up; what is done once has none."""
    runs = [way() for _ in range(times + (times > 1))]
    runs = runs[1:] or runs
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}
