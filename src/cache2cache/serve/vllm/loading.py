"""What a request asks of vLLM's connector, and which slots of the paged cache that concerns. Knows nothing of vLLM."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from cache2cache.errors import PayloadError
from cache2cache.serve.payload import ids_digest
from cache2cache.serve.vllm import store

CACHE_FIELD = "c2c_cache"
"""Of `kv_transfer_params`: the name of the fused cache of all prompt tokens but the last."""


@dataclass(frozen=True)
class Asked:
    """A request that has to do with a fused cache."""

    cache: str | None
    """Its name, if it has one that a cache may have."""
    problem: str | None
    """Why the request must fail: without its cache it would get the answer to another one."""


def asked(
    params: Mapping[str, Any] | None, salt: str | None, ids: Sequence[int] | None, *, whole: bool
) -> Asked | None:
    """What a request says about a fused cache; None if it says nothing.

    Args:
        params: its `kv_transfer_params`.
        salt: its `cache_salt`, which keeps blocks that are fused apart from those of the same tokens that are not.
        ids: its prompt.
        whole: whether it asks for what is only known when the whole prompt is read, such as its probabilities.
    """
    name = (params or {}).get(CACHE_FIELD)
    if name is None:
        if (salt or "").startswith(store.SALT_PREFIX):
            return Asked(None, f"{CACHE_FIELD} must name the cache that cache_salt belongs to")
        return None
    try:
        belongs = store.salt(name) if isinstance(name, str) else ""
    except PayloadError:
        belongs = ""
    if not belongs:
        return Asked(None, f"{CACHE_FIELD} is no name of a fused cache")
    problems = {
        f"cache_salt must be {belongs}": salt != belongs,
        "the prompt must be two tokens or more": ids is None or len(ids) < 2,
        "probabilities of the prompt are not known where it is loaded": whole,
    }
    return Asked(name, next((problem for problem, found in problems.items() if found), None))


@dataclass(frozen=True)
class Load:
    """What vLLM's workers have to load before a request can be answered."""

    request: str
    asked: Asked
    digest: str
    """Of the prompt's token ids."""
    prompt: int
    """Length of the prompt."""
    start: int
    """First position that is not there already."""
    blocks: tuple[int, ...]
    """Of the paged cache, from the first position on."""

    @classmethod
    def of(cls, request: str, asked: Asked, ids: Sequence[int], start: int, blocks: Sequence[int]) -> Load:
        """What a request lacks from position `start` on."""
        return cls(request, asked, ids_digest(ids), len(ids), start, tuple(blocks))

    def check(self, fused: store.Fused, layers: int, kv_heads: int, head_dim: int) -> None:
        """Raise PayloadError unless a cache is this prompt's, and of a model of this shape."""
        got = (fused.layers, fused.kv_heads, fused.head_dim, fused.positions, fused.digest)
        allowed = (layers, kv_heads, head_dim, self.prompt - 1, self.digest)
        if got != allowed:
            raise PayloadError(
                "the fused cache is another model's or another prompt's (layers, heads, head size, positions, digest)",
                got=got, allowed=allowed,
            )  # fmt: skip

    def slots(self, block_size: int) -> torch.Tensor:
        """(P,) where in the paged cache positions from `start` to the prompt's last but one lie."""
        positions = torch.arange(self.start, self.prompt - 1)
        return torch.tensor(self.blocks)[positions // block_size] * block_size + positions % block_size


def heads_of(rank: int, ranks: int, kv_heads: int) -> range:
    """The KV heads that one of vLLM's tensor-parallel workers keeps; with more workers than heads, several keep one."""
    here = max(1, kv_heads // ranks)
    first = rank * here if ranks <= kv_heads else rank // (ranks // kv_heads)
    return range(first, first + here)
