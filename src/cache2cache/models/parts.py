"""Parts of a prompt's cache: some of its positions, some of the model's layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache2cache.errors import DataError

Ids = Sequence[int] | np.ndarray
"""Token ids of one prompt."""

Chosen = Sequence[int] | np.ndarray | None
"""Positions or layers; None is all."""


@dataclass(frozen=True, eq=False)
class Part:
    """Which positions and layers of a cache a record holds, or a request wants. Each in ascending order, None is all."""

    positions: np.ndarray | None
    """(P,)"""
    layers: np.ndarray | None

    @classmethod
    def of(cls, positions: Chosen, layers: Chosen, tokens: int, depth: int) -> Part:
        """Of a prompt's cache.

        Args:
            tokens: of the prompt.
            depth: layers of the model.

        Raises:
            DataError: the prompt or the model has no such part.
        """
        return cls(_some(positions, tokens, "positions"), _some(layers, depth, "layers"))

    def covers(self, wanted: Part) -> bool:
        """Whether everything that is wanted is in this part."""
        return _covers(self.positions, wanted.positions) and _covers(self.layers, wanted.layers)

    def pick(self, cache: torch.Tensor, positions: Chosen, layers: Chosen) -> torch.Tensor:
        """What is asked for, in the order asked for, of the cache (2, L, H, P, D) that holds this part."""
        return _picked(_picked(cache, 1, layers, self.layers), 3, positions, self.positions)


def _some(chosen: Chosen, size: int, what: str) -> np.ndarray | None:
    if chosen is None:
        return None
    unique = np.unique(np.asarray(chosen, dtype=np.int64))
    if len(unique) and not 0 <= unique[0] <= unique[-1] < size:
        raise DataError(f"a cache has no such {what}", got=f"{unique[0]}–{unique[-1]}", allowed=f"0–{size - 1}")
    return None if len(unique) == size else unique


def _covers(held: np.ndarray | None, wanted: np.ndarray | None) -> bool:
    return held is None or (wanted is not None and bool(np.isin(wanted, held).all()))


def _picked(cache: torch.Tensor, dim: int, wanted: Chosen, held: np.ndarray | None) -> torch.Tensor:
    """Along one dimension; without a copy if it is a run."""
    if wanted is None:
        return cache
    at = np.asarray(wanted, dtype=np.int64)
    index = at if held is None else np.searchsorted(held, at)
    if len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index))):
        return cache.narrow(dim, int(index[0]), len(index))
    return cache.index_select(dim, torch.as_tensor(index))


def right_padded(rows: Sequence[Ids]) -> torch.Tensor:
    """Ids or positions as one tensor (B, N), zeros on the right; N is at least 1."""
    padded = torch.zeros((len(rows), max(1, *map(len, rows))), dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.as_tensor(row)
    return padded


def chosen_positions(prompts: Sequence[Ids], positions: Sequence[Chosen] | None) -> list[np.ndarray]:
    """Positions of each prompt, all of them where nothing is chosen."""
    every = [np.arange(len(ids)) for ids in prompts]
    if positions is None:
        return every
    return [whole if some is None else np.asarray(some) for some, whole in zip(positions, every, strict=True)]
