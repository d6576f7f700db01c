"""Text pieces while the receiver decodes: `transformers.generate` in a thread, a streamer in between."""

from __future__ import annotations

import queue
import threading
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from cache2cache.errors import GenerationError
from cache2cache.text.detokenise import Detokeniser
from cache2cache.types import Generation

if TYPE_CHECKING:
    from cache2cache.pipeline import C2C, Prefill


class _Stopped(StoppingCriteria):
    """Ends decoding when the reader has gone away."""

    def __init__(self) -> None:
        self.event = threading.Event()

    def __call__(self, input_ids, scores, **kwargs):  # type: ignore[override]
        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)


class _Pieces(BaseStreamer):
    """What `generate` writes, as text. Its own streamer decodes each line by itself, which loses spaces."""

    def __init__(self, detokeniser: Detokeniser):
        self.arrived: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        """Pieces, and None once there will be no more."""
        self._detokeniser = detokeniser
        self._prompt_is_next = True

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompts, and then with each row's next token."""
        if len(value) > 1:
            raise GenerationError(
                "only one answer can be streamed", got=len(value), hint="Leave num_return_sequences out"
            )
        if not self._prompt_is_next:
            self.arrived.put(self._detokeniser.add(int(value)))
        self._prompt_is_next = False

    def end(self) -> None:
        """Called after the last token."""
        self.arrived.put(self._detokeniser.end())


def stream(pair: C2C, prefill: Prefill, **generate_kwargs: Any) -> Generator[str, None, Generation]:
    """Yield text as it is written; return the whole answer. Closing the generator ends the decoding."""
    pieces = _Pieces(Detokeniser(pair.receiver.tokenizer))  # type: ignore[arg-type]
    stopped = _Stopped()
    criteria = StoppingCriteriaList([*(generate_kwargs.pop("stopping_criteria", None) or []), stopped])
    outcome: list[Generation | BaseException] = []

    def work() -> None:
        try:
            outcome.extend(pair.decode(prefill, streamer=pieces, stopping_criteria=criteria, **generate_kwargs))
        except BaseException as error:  # handed to the reader below, whatever it is
            outcome.append(error)
        finally:
            pieces.arrived.put(None)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in iter(pieces.arrived.get, None) if piece)
    finally:
        stopped.event.set()
        thread.join()
    if isinstance(outcome[0], BaseException):
        raise outcome[0]
    return outcome[0]
