"""A sharer's service without HTTP, so that its stages can be measured and its answers meddled with, and a line to send over."""

from __future__ import annotations

import socket
import struct
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Self

import torch

from cache2cache.inputs import Row
from cache2cache.models.load import LanguageModel
from cache2cache.models.prefills import prefill_rows
from cache2cache.pipeline import C2C
from cache2cache.serve import wire
from cache2cache.serve.caller import Reply
from cache2cache.serve.payload import SharerCache, ids_digest
from cache2cache.serve.remote import RemoteOptions, RemoteSharer
from cache2cache.serve.tokenizer_files import pack

_LENGTH = struct.Struct("<Q")


class Line:
    """A TCP connection over this machine's own network, with somebody at its end who says when all has arrived."""

    def __enter__(self) -> Self:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._receive)
        self._thread.start()
        self._out = socket.create_connection(self._listener.getsockname())
        self._out.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._thread.join()
        self._listener.close()

    def send(self, data: bytes) -> None:
        """Returns once the other end has everything."""
        self._out.sendall(_LENGTH.pack(len(data)))
        self._out.sendall(data)
        self._out.recv(1)

    def _receive(self) -> None:
        into, _ = self._listener.accept()
        with into, into.makefile("rb") as stream:
            while size := stream.read(_LENGTH.size):
                stream.read(_LENGTH.unpack(size)[0])
                into.sendall(b"\1")


class Service:
    """Answers as `c2c share` does, one request at a time, in place of a `Caller`.

    Args:
        key: to sign with.
        carry: what happens to an answer on its way; nothing by default.
    """

    address = "in this process"

    def __init__(self, lm: LanguageModel, *, key: bytes | None = None, carry: Callable[[bytes], bytes] = bytes):
        self._lm, self._key, self.carry = lm, key, carry
        self.seconds: defaultdict[str, float] = defaultdict(float)
        """By stage, added up: read, encode, transfer."""

    def ask(self, method: str, path: str, *, body: bytes, max_bytes: int) -> Reply:
        """See `Caller.ask`."""
        request = wire.parse(wire.CacheRequest, body)
        key = None if self._key is None else wire.request_key(self._key, body)
        with self._clock("read"):
            caches = [self._read(prompt, request) for prompt in request.prompts]
        options = {"precision": request.precision, "compress": request.compress, "key": key}
        with self._clock("encode"):
            answer = wire.join(cache.to_bytes(**options) for cache in caches)  # type: ignore[arg-type]
        with self._clock("transfer"):
            answer = self.carry(answer)
        return Reply(answer, {})

    def _read(self, prompt: wire.Prompt, request: wire.CacheRequest) -> SharerCache:
        assert prompt.ids is not None and prompt.positions is not None and request.layers is not None
        return read(self._lm, prompt.ids, prompt.positions, request.layers)

    @contextmanager
    def _clock(self, stage: str) -> Iterator[None]:
        begun = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - begun


def listen(to: Any, lm: LanguageModel, **options: Any) -> RemoteSharer:
    """A sharer that is asked through something in place of a `Caller`. Options are `RemoteOptions`."""
    described = wire.Description(
        card=lm.card, dtype=str(lm.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        tokenizer=pack(lm.tokenizer), limits=wire.Limits(rows=64, tokens=1 << 20),
    )  # fmt: skip
    return RemoteSharer(to, RemoteOptions(**options), described)


def read(lm: LanguageModel, ids: Any, positions: Any, layers: tuple[int, ...]) -> SharerCache:
    """What a sharer has read of one prompt.

    Args:
        ids: (M,)
        positions: (P,) those that are wanted.
    """
    (cache,) = prefill_rows(lm, [ids], [positions], layers)  # type: ignore[arg-type]
    return SharerCache(lm.card, ids_digest(ids), len(ids), torch.as_tensor(positions), layers, cache)


def wanted(pair: C2C, row: Row) -> tuple[list[int], tuple[int, ...]]:
    """The sharer's positions that will be fused, ascending, and the mapped layers, ascending."""
    (part,), (fuser,) = row.sharers, pair.fusers
    assert part is not None, "the sharer speaks"
    return sorted(set(part.alignment[part.due > 0].tolist())), tuple(sorted(set(fuser.config.layer_map)))
