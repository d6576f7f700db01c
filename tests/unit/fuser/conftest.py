from collections.abc import Callable

import pytest
import torch

from cache2cache.fuser.base import Fuser

Caches = Callable[[Fuser], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]


@pytest.fixture
def caches() -> Caches:
    """Random arguments for `Fuser.delta`: caches of both sides (2 rows, 5 positions) and their positions."""

    def make(fuser: Fuser, rows: int = 2, positions: int = 5):
        own, other = fuser.config.receiver.geometry, fuser.config.sharer.geometry
        generator = torch.Generator().manual_seed(0)

        def kv(kv_heads: int, head_dim: int) -> torch.Tensor:
            return torch.randn(2, own.layers, rows, kv_heads, positions, head_dim, generator=generator)

        at = torch.arange(positions).expand(rows, -1)
        return kv(own.kv_heads, own.head_dim), kv(other.kv_heads, other.head_dim), at, at + 3

    return make
