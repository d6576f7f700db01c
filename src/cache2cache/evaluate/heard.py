"""What a fused system hears: the sharers' own caches, or what a control puts in their place."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from cache2cache.errors import DataError
from cache2cache.evaluate.asking import Tell, in_parts, tell_left_out
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.prefills import Heard, Prefills
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.inputs import Row, SharerRow
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.types import Timings
from cache2cache.verify import geometry_at_rest

Listen = Callable[[Sequence[Item], Sequence[Row]], tuple[Sequence[Row], Heard]]
"""(items, rows) → the rows as they are fused, and where the sharers' caches come from."""

STATISTICS_ROWS = 64
"""Rows of a task that the sharer's mean and covariance are taken from."""


class Own:
    """The right caches."""

    def __init__(self, pair: C2C, prefills: Prefills):
        self._pair, self._prefills = pair, prefills

    def __call__(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[Sequence[Row], Heard]:
        return rows, self.heard

    def heard(self, sharer: int, rows: Sequence[Row], timings: Timings) -> list[torch.Tensor]:
        """See `Heard`. A row in which this sharer is silent hears a token that nothing is aligned to."""
        prompts = [np.zeros(1, np.int64) if row.sharers[sharer] is None else row.sharers[sharer].ids for row in rows]  # type: ignore[union-attr]
        return self._prefills.caches(self._pair.sharers[sharer], prompts, timings, "sharer_prefill")


class Mismatched(Own):
    """The caches of another row.

    Args:
        partner: task → id → the item whose caches are heard instead.
    """

    def __init__(self, pair: C2C, prefills: Prefills, partner: Mapping[str, Mapping[str, Item]]):
        super().__init__(pair, prefills)
        self._partner = partner

    def __call__(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[Sequence[Row], Heard]:
        others = self._pair.rows([self._partner[item.task][item.id].messages for item in items])
        return [with_sharers_of(row, other) for row, other in zip(rows, others, strict=True)], self.heard


def with_sharers_of(row: Row, other: Row) -> Row:
    """The row, listening to what the sharers read of the other one, aligned from the right."""
    crossed = []
    for mine, theirs in zip(row.sharers, other.sharers, strict=True):
        if mine is None or theirs is None:
            crossed.append(None)
            continue
        alignment = np.maximum(mine.alignment + len(theirs.ids) - len(mine.ids), 0)
        crossed.append(SharerRow(theirs.ids, alignment, mine.due))
    return replace(row, sharers=tuple(crossed))


class Replaced:
    """Caches drawn from the statistics of the sharers' features: their mean, or noise of the same covariance.

    Args:
        statistics: task → one per sharer.
        noise: draw at random instead of the mean, for each row by the seed and the row's id.
    """

    def __init__(self, statistics: Mapping[str, Sequence[FeatureStatistics]], *, noise: bool, seed: int):
        self._statistics, self._noise, self._seed = statistics, noise, seed

    def __call__(self, items: Sequence[Item], rows: Sequence[Row]) -> tuple[Sequence[Row], Heard]:
        def heard(sharer: int, rows: Sequence[Row], timings: Timings) -> list[torch.Tensor]:
            return [self._cache(sharer, item, row) for item, row in zip(items, rows, strict=True)]

        return rows, heard

    def _cache(self, sharer: int, item: Item, row: Row) -> torch.Tensor:
        statistics, part = self._statistics[item.task][sharer], row.sharers[sharer]
        size = statistics.geometry
        # What nothing is aligned to is never heard, and stays zero.
        positions = torch.zeros(1, dtype=torch.long) if part is None else _heard_positions(part)
        cache = torch.zeros(2, size.layers, size.kv_heads, 1 if part is None else len(part.ids), size.head_dim)
        if self._noise:
            digest = hashlib.sha256(f"{self._seed}/{item.task}/{item.id}/{sharer}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            cache[:, :, :, positions] = statistics.noise_cache(positions, generator)
        else:
            cache[:, :, :, positions] = statistics.mean_cache(positions)
        return cache


def _heard_positions(part: SharerRow) -> torch.Tensor:
    """Positions of the sharer that some fused position of the receiver is aligned to."""
    return torch.as_tensor(np.unique(part.alignment[part.due > 0]))


def sharer_statistics(
    pair: C2C, items: Sequence[Item], prefills: Prefills, *, batch_size: int, tell: Tell
) -> list[FeatureStatistics]:
    """Mean and covariance of each sharer's features at the positions that would be fused, over the first rows.

    Args:
        batch_size: most rows that are read together.
        tell: told which rows could not be read and are left out.

    Raises:
        DataError: no rows.
        EvaluationError: none of them can be read.
    """
    if not items:
        raise DataError("the mean of the sharer's features needs rows", got=0)
    own = Own(pair, prefills)

    def heard(items: Sequence[Item]) -> list[list[tuple[torch.Tensor, torch.Tensor]]]:
        """Of each row, by sharer: the positions that are heard, and what is cached there."""
        prefills.clear()
        rows = pair.rows([item.messages for item in items])
        by_sharer = []
        for sharer in range(len(pair.sharers)):
            parts = [row.sharers[sharer] for row in rows]
            positions = [_heard_positions(part) for part in parts if part is not None]  # every sharer speaks by default
            caches = own.heard(sharer, rows, Timings())
            by_sharer.append([(at, cache[:, :, :, at]) for at, cache in zip(positions, caches, strict=True)])
        return [list(of_row) for of_row in zip(*by_sharer, strict=True)]

    found, failed = in_parts(items[:STATISTICS_ROWS], batch_size, heard)
    prefills.clear()
    tell_left_out(tell, failed, "the mean of the sharer's features")
    statistics = []
    for lm, of_sharer in zip(pair.sharers, zip(*(x for x in found if x is not None), strict=True), strict=True):
        positions, caches = zip(*of_sharer, strict=True)
        geometry = geometry_at_rest(lm) if isinstance(lm, LanguageModel) else lm.card.geometry
        statistics.append(FeatureStatistics.of(geometry, caches, positions))
    return statistics
