"""Text pieces while the receiver decodes: `transformers.generate` in a thread, a streamer in between."""

from __future__ import annotations

import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from cache2cache.types import Generation

if TYPE_CHECKING:
    from cache2cache.pipeline import C2C, Prefill


class _Stopped(StoppingCriteria):
    """Ends decoding when the reader has gone away."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


def stream(pair: C2C, prefill: Prefill, **generate_kwargs: Any) -> Generator[str, None, Generation]:
    """Yield text as it is written; return the whole answer. Closing the generator ends the decoding."""
    streamer = TextIteratorStreamer(pair.receiver.tokenizer, skip_prompt=True, skip_special_tokens=True)  # type: ignore[arg-type]
    stopped = _Stopped()
    criteria = StoppingCriteriaList([*generate_kwargs.pop("stopping_criteria", []), stopped])
    outcome: list[Generation | BaseException] = []

    def work() -> None:
        try:
            outcome.extend(pair.decode(prefill, streamer=streamer, stopping_criteria=criteria, **generate_kwargs))
        except BaseException as error:  # handed to the reader below, whatever it is
            outcome.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stopped.event.set()
        thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
