"""Fused caches of conversations that may go on."""

from __future__ import annotations

import hashlib
import json
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, replace

from transformers import DynamicCache

from cache2cache.models import kv
from cache2cache.pipeline import Prefill
from cache2cache.serve.engine import Request
from cache2cache.types import Message


@dataclass(frozen=True)
class Kept:
    """An answered conversation."""

    prefill: Prefill
    """One row, as it was decoded."""
    written: list[int]
    """Tokens of the answer."""

    def size(self) -> int:
        """Bytes of all caches."""
        return sum(map(_bytes, (self.prefill.cache, *self.prefill.sharer_caches)))


class PrefixCache:
    """The conversations answered last, by their messages, who speaks and who answers. A request that goes on with one
    is read from there, as the next turn of a `Chat` is: earlier turns stay fused as they were.

    Args:
        limit: bytes of caches; the conversations that were used the longest time ago make room. 0 keeps nothing.
    """

    def __init__(self, limit: int):
        self.limit = limit
        self.bytes = 0
        """Held now."""
        self._kept: OrderedDict[str, Kept] = OrderedDict()

    def find(self, request: Request) -> Kept | None:
        """The longest conversation that a request goes on with. Its caches may be cut and extended."""
        for key in reversed(list(_keys(request))[:-1]) if self.limit else ():
            if kept := self._kept.get(key):
                self._kept.move_to_end(key)
                caches = [kv.clone(cache) for cache in kept.prefill.sharer_caches]
                return replace(
                    kept, prefill=replace(kept.prefill, cache=kv.clone(kept.prefill.cache), sharer_caches=caches)
                )
        return None

    def keep(self, request: Request, text: str, kept: Kept) -> None:
        """Remember an answered conversation; one that is larger than the limit by itself is not kept.

        Args:
            request: with messages.
            text: the answer, as the next request will repeat it.
        """
        if kept.size() > self.limit:
            return
        answered = replace(request, prompt=[*request.prompt, Message(role="assistant", content=text)])
        key = list(_keys(answered))[-1]
        if old := self._kept.pop(key, None):
            self.bytes -= old.size()
        self._kept[key] = kept
        self.bytes += kept.size()
        while self.bytes > self.limit:
            self.bytes -= self._kept.popitem(last=False)[1].size()


def _keys(request: Request) -> Iterator[str]:
    """Of the conversation up to each of its messages; text is no conversation."""
    digest = hashlib.sha256(json.dumps([request.alone, sorted(set(request.sharers))]).encode())
    for message in () if isinstance(request.prompt, str) else request.prompt:
        digest.update(json.dumps([message["role"], message["content"]]).encode())
        yield digest.hexdigest()


def _bytes(cache: DynamicCache) -> int:
    return sum(x.nbytes for layer in range(len(cache.layers)) for x in kv.layer_tensors(cache, layer))
