"""A sharer that is elsewhere: it is asked for the positions and layers that will be fused, and nothing else travels."""

from __future__ import annotations

import hmac
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cache2cache.errors import ModelError, PayloadError, RequestError, SharerError
from cache2cache.models import kv
from cache2cache.serve import wire
from cache2cache.serve.caller import Caller
from cache2cache.serve.contents import FLOATS
from cache2cache.serve.payload import Precision, SharerCache
from cache2cache.serve.tokenizer_files import unpack
from cache2cache.types import ModelCard

_MAX_DESCRIPTION_BYTES = 64 << 20
_OVERHEAD_BYTES = 1 << 17
"""Of one payload: its envelope and both headers, generously."""


@dataclass(frozen=True)
class RemoteOptions:
    """How sharers elsewhere are asked."""

    token: str | None = field(default=None, repr=False)
    """Sent as `Authorization: Bearer`, in clear text unless the address begins with https."""
    key: bytes | None = field(default=None, repr=False)
    """Shared with the service, which signs with it; answers that are not signed are refused then."""
    precision: Precision | None = None
    """That caches travel in; by default as they are, and then answers are those of one process, bit for bit."""
    compress: bool = False
    timeout: float = 30.0
    """Seconds, see `Caller`."""
    retries: int = 2
    cooldown: float = 2.0


class RemoteSharer:
    """A `Sharer` whose weights are elsewhere. Keeps no cache: a later turn is read from its beginning there.

    Make one with `connect`.
    """

    def __init__(self, caller: Caller, options: RemoteOptions, described: wire.Description):
        self._caller, self._options, self._limits = caller, options, described.limits
        self.address = caller.address
        self.card: ModelCard = described.card
        try:
            self.tokenizer: PreTrainedTokenizerBase = unpack(described.tokenizer, described.card.tokenizer)
        except ModelError as error:
            raise SharerError(f"the sharer at {self.address} sends a bad tokenizer", got=str(error)) from error
        self._dtype = FLOATS[described.dtype]

    @classmethod
    def connect(cls, address: str, options: RemoteOptions | None = None) -> RemoteSharer:
        """Ask who is there.

        Args:
            address: http://host:port of a `c2c share`.

        Raises:
            SharerError: it cannot be reached, refuses, or does not describe itself as it should.
        """
        options = options or RemoteOptions()
        caller = Caller(address, options.token, options.timeout, options.retries, options.cooldown)
        reply = caller.ask("GET", wire.SHARER_PATH, max_bytes=_MAX_DESCRIPTION_BYTES)
        if options.key is not None:
            signed = reply.headers.get(wire.SIGNATURE_HEADER, "")
            if not hmac.compare_digest(signed.encode(), wire.signature(options.key, reply.body).encode()):
                raise SharerError(f"the sharer at {address} does not sign with this key", hint="Give both the same key")
        try:
            described = wire.parse(wire.Description, reply.body)
        except RequestError as error:
            raise SharerError(f"what is at {address} is no sharer", got=error.got) from error
        return cls(caller, options, described)

    @property
    def model(self) -> PreTrainedModel:
        """Not here: raises ModelError, for whoever takes this for a `LanguageModel`."""
        raise ModelError(
            f"the weights of {self.card.id} are needed here", got=f"a sharer at {self.address}",
            hint="Give its name or folder instead",
        )  # fmt: skip

    @property
    def device(self) -> torch.device:
        """Where its caches arrive."""
        return torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        """Of its caches."""
        return self._dtype

    def prefill(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        needed: torch.Tensor,
        layers: Sequence[int],
    ) -> DynamicCache:
        """Have a batch read there, see `Sharer`. What is not needed is zero in the cache that is returned.

        Raises:
            SharerError: it cannot be heard, is another model by now, or sends something else than was asked for.
        """
        batch, width = ids.shape
        size, used = self.card.geometry, tuple(sorted(set(layers)))
        shape = (batch, size.kv_heads, width, size.head_dim)
        # One number stands for all zeros of a layer of which nothing is needed.
        held = {i: [torch.zeros((), dtype=self._travels_as).expand(shape)] * 2 for i in range(size.layers)}
        if needed.any():
            held |= {i: [torch.zeros(shape, dtype=self._travels_as) for _ in range(2)] for i in used}
            starts = (width - mask.sum(1)).tolist()
            rows = [ids[b, start:] for b, start in enumerate(starts)]
            # A row of which nothing is needed is read as well: the others get the bits that it gives their batch.
            wanted = [needed[b, start:].nonzero().squeeze(1).tolist() or [0] for b, start in enumerate(starts)]
            for some in self._batches(rows):
                answers = self._ask([rows[b] for b in some], [wanted[b] for b in some], used)
                for b, answer in zip(some, answers, strict=True):
                    for u, layer in enumerate(used):
                        for side, x in zip(held[layer], answer.kv[:, u], strict=True):
                            side[b, :, answer.positions + starts[b]] = x
        return kv.from_tensors([(keys, values) for keys, values in held.values()])

    @property
    def _travels_as(self) -> torch.dtype:
        return FLOATS.get(self._options.precision or "", self._dtype)

    def _batches(self, rows: Sequence[torch.Tensor]) -> Iterator[range]:
        """Indices of rows that the service reads at once; all of them, unless they are too many for it."""
        start = longest = 0
        for b, row in enumerate(rows):
            longest = max(longest, len(row))
            count = b + 1 - start
            if b > start and (count > self._limits.rows or count * longest > self._limits.tokens):
                yield range(start, b)
                start, longest = b, len(row)
        yield range(start, len(rows))

    def _ask(
        self, rows: Sequence[torch.Tensor], wanted: Sequence[list[int]], layers: tuple[int, ...]
    ) -> list[SharerCache]:
        prompts = [
            wire.Prompt(ids=tuple(row.tolist()), positions=tuple(positions))
            for row, positions in zip(rows, wanted, strict=True)
        ]
        request = wire.CacheRequest(
            prompts=tuple(prompts), layers=layers, precision=self._options.precision, compress=self._options.compress
        )
        body = request.model_dump_json(exclude_defaults=True).encode()
        largest = [self._largest(len(positions), len(layers)) for positions in wanted]
        reply = self._caller.ask("POST", wire.CACHE_PATH, body=body, max_bytes=sum(largest))
        key = None if self._options.key is None else wire.request_key(self._options.key, body)
        try:
            payloads = wire.split(reply.body, len(rows))
            answers = [
                SharerCache.from_bytes(bytes(payload), max_bytes=size, key=key)
                for payload, size in zip(payloads, largest, strict=True)
            ]
            for answer, row, positions in zip(answers, rows, wanted, strict=True):
                answer.matches(self.card, row)
                if (answer.positions.tolist(), answer.layers) != (positions, layers):
                    raise PayloadError("the payload holds other positions or layers than were asked for")
                if answer.kv.dtype != self._travels_as:
                    raise PayloadError("the payload is of another dtype", got=answer.kv.dtype, allowed=self._travels_as)
        except PayloadError as error:
            raise SharerError(f"what the sharer at {self.address} sends is wrong", got=str(error)) from error
        return answers

    def _largest(self, positions: int, layers: int) -> int:
        """Bytes that no honest payload exceeds: numbers of four bytes, scales, positions, and what is around them."""
        size = self.card.geometry
        numbers = 2 * layers * size.features * (positions + 1)
        return 4 * numbers + 8 * positions + _OVERHEAD_BYTES
