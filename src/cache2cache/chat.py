"""A conversation of many turns on one fused cache: what was read in earlier turns is not read again."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from cache2cache.errors import GenerationError
from cache2cache.inputs import Inputs
from cache2cache.models import kv
from cache2cache.pipeline import C2C, Prefill
from cache2cache.streaming import stream
from cache2cache.types import Generation, Message, Timings


class Chat:
    """One conversation with a pair. Each user turn is one more span on both sides.

    When a template writes earlier turns differently later on (some drop reasoning), everything from the first
    token that differs is read again, and only that.
    """

    def __init__(self, pair: C2C, messages: list[Message]):
        self.pair = pair
        self._opening = list(messages)
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system message."""
        self.messages: list[Message] = list(self._opening)
        self._last: Prefill | None = None
        self._written: list[int] = []

    def send(self, text: str, **generate_kwargs: Any) -> Generation:
        """One user turn and its answer. A turn that fails is taken back."""
        with self._taken_back():
            prefill = self._read(text)
            answer = self.pair.decode(prefill, **self._single(generate_kwargs))[0]
        return self._keep(prefill, answer)

    def stream(self, text: str, **generate_kwargs: Any) -> Generator[str, None, Generation]:
        """The same, piece by piece. A reader that leaves early takes the turn back."""
        with self._taken_back():
            prefill = self._read(text)
            answer = yield from stream(self.pair, prefill, **self._single(generate_kwargs))
        return self._keep(prefill, answer)

    @contextmanager
    def _taken_back(self) -> Iterator[None]:
        """As if a turn that fails had never begun; the cache, which may hold some of it, is read anew."""
        messages = list(self.messages)
        try:
            yield
        except BaseException:
            self.messages, self._last = messages, None
            raise

    def _read(self, text: str) -> Prefill:
        timings = Timings()
        messages = [*self.messages, Message(role="user", content=text)]
        prepared = self.pair.prepare([messages], None, timings)
        last = self._last
        if last is not None:
            prepared = rewind(last, self._written, prepared)
        prefill = self.pair.read(prepared, resume=last, timings=timings)
        self.messages = messages
        return prefill

    def _keep(self, prefill: Prefill, answer: Generation) -> Generation:
        self._last, self._written = prefill, answer.ids
        self.messages.append(Message(role="assistant", content=answer.text))
        return answer

    @staticmethod
    def _single(generate_kwargs: dict[str, Any]) -> dict[str, Any]:
        config = generate_kwargs.get("generation_config")
        for name in ("num_beams", "num_return_sequences"):
            if (several := generate_kwargs.get(name, getattr(config, name, None)) or 1) > 1:
                raise GenerationError("a chat follows one answer", got=f"{name} {several}", allowed=1)
        return generate_kwargs


def rewind(last: Prefill, written: Sequence[int], prepared: Inputs) -> Inputs:
    """Cut every cache of an earlier turn back to the tokens that a new prompt still begins with, one row each.

    Args:
        last: the earlier turn, as it was decoded; its caches are cut in place.
        written: the tokens of its answer.
        prepared: the new prompt.

    Returns:
        The new prompt, of which nothing is due that the receiver's cache holds already: it stays fused as it was.
    """
    known = torch.cat([last.ids[0].cpu(), torch.tensor(written, dtype=torch.long)])
    # The prompt's last token must be read by the decoder, so it may not be in the cache yet.
    keep = min(_common(known, prepared.ids[0]), prepared.ids.shape[1] - 1, kv.length(last.cache))
    kv.truncate(last.cache, keep)
    parts = []
    for cache, old, new in zip(last.sharer_caches, last.inputs.sharers, prepared.sharers, strict=True):
        if old is not None and new is not None:
            kv.truncate(cache, min(_common(old.ids[0], new.ids[0]), kv.length(cache)))
        if new is not None:
            due = new.due.clone()
            due[:, :keep] = 0
            new = replace(new, due=due)
        parts.append(new)
    return replace(prepared, sharers=tuple(parts))


def _common(a: torch.Tensor, b: torch.Tensor) -> int:
    """Length of the common prefix of two 1-D tensors."""
    size = min(len(a), len(b))
    return int((a[:size] == b[:size]).long().cumprod(0).sum())
