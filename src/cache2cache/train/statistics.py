"""What is measured of a pair's caches before the first step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache2cache.fuser.compact import CompactFuser
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.models.load import LanguageModel
from cache2cache.models.parts import Ids
from cache2cache.models.prefills import by_length, prefill_rows
from cache2cache.pipeline import C2C
from cache2cache.train.batch import Item, TrainRow
from cache2cache.verify import check_rotation, geometry_at_rest

STATISTICS_ROWS = 256
"""Training rows that are measured: of a stream the first ones, otherwise `spread` over all."""

_POSITIONS = 4096
"""Of those, so many fused positions at most, spread evenly."""

_BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Sample:
    """The caches of some rows at their fused positions, row after row, on the CPU."""

    own: torch.Tensor
    """(2, L_r, H_r, n, D_r) the receiver's, where it is fused before anything else is: later spans depend on the fuser."""
    own_positions: torch.Tensor
    """(n,)"""
    theirs: torch.Tensor
    """(2, U, H_s, m, D_s) the sharer's, of the U mapped layers in ascending order."""
    their_positions: torch.Tensor
    """(m,)"""


def spread(rows: int) -> list[int]:
    """Which of so many training rows are measured: evenly spread ones, since rows stand source by source."""
    count = min(STATISTICS_ROWS, rows)
    return [i * rows // count for i in range(count)]


def sample(items: Sequence[Item], pair: C2C) -> Sample:
    """The caches of these rows, computed where they were not ahead."""
    rows = [item.row for item in items]
    step = _step(rows)
    # From the end, where every row is fused.
    some = [np.arange(len(row.heard) - 1, -1, -step)[::-1] for row in rows]
    heard = [row.heard[at] for row, at in zip(rows, some, strict=True)]
    clean = [at[at < row.first_stop] for row, at in zip(rows, heard, strict=True)]
    heard_at = [row.heard_at[at] for row, at in zip(rows, some, strict=True)]
    if all(item.own is not None and item.theirs is not None for item in items):
        own = [item.own[:, :, :, at] for item, at in zip(items, clean, strict=True)]  # type: ignore[index]
        theirs = [item.theirs[:, :, :, at.copy()] for item, at in zip(items, some, strict=True)]  # type: ignore[index]
    else:
        own = _prefilled(pair.receiver, [row.row.ids[: row.first_stop] for row in rows], clean, None)
        their_ids = [row.row.sharers[0].ids for row in rows]  # type: ignore[union-attr]
        theirs = _prefilled(pair.sharers[0], their_ids, heard_at, mapped(pair))
    return Sample(
        torch.cat(own, dim=3),
        torch.as_tensor(np.concatenate(clean)),
        torch.cat(theirs, dim=3),
        torch.as_tensor(np.concatenate(heard_at)),
    )


def measured_rows(rows: Sequence[TrainRow]) -> int:
    """How many whole rows have as many positions as are measured of these training rows."""
    measured = [rows[i] for i in spread(len(rows))]
    return math.ceil(len(measured) / _step(measured))


def _step(rows: Sequence[TrainRow]) -> int:
    """Of how many fused positions one is measured."""
    return max(1, math.ceil(sum(len(row.heard) for row in rows) / _POSITIONS))


def mapped(pair: C2C) -> list[int]:
    """The sharer's layers that the fuser hears, in ascending order."""
    (fuser,) = pair.fusers
    return sorted(set(fuser.config.layer_map))


def standardise(fuser: CompactFuser, found: Sample) -> None:
    """Give a compact fuser the statistics of the positions that it will fuse."""
    layers = sorted(set(fuser.config.layer_map))
    heard = found.theirs[:, [layers.index(layer) for layer in fuser.config.layer_map]]
    device = fuser.own_mean.device
    fuser.standardise(
        found.own[:, :, None].to(device), heard[:, :, None].to(device),
        found.own_positions[None].to(device), found.their_positions[None].to(device),
    )  # fmt: skip


def sharer_statistics(pair: C2C, found: Sample) -> FeatureStatistics:
    """Of the sharer's positions that the fuser will hear, the mapped layers; of keys that cannot be rotated back, as they are."""
    (sharer,) = pair.sharers
    return FeatureStatistics.of(geometry_at_rest(sharer).only(mapped(pair)), [found.theirs], [found.their_positions])


def check_rotations(pair: C2C) -> None:
    """Prove that the keys can be rotated back to position 0, where the fuser is of a kind that does so.

    Raises:
        ModelError: they cannot.
    """
    (fuser,) = pair.fusers
    if isinstance(fuser, CompactFuser) and fuser.sizes.still_keys:
        for lm in (pair.receiver, *pair.sharers):
            check_rotation(lm)


def _prefilled(
    lm: LanguageModel, prompts: Sequence[Ids], positions: Sequence[np.ndarray], layers: Sequence[int] | None
):
    """Parts of the caches of some prompts, (2, L, H, P, D) each, on the CPU."""
    found: dict[int, torch.Tensor] = {}
    for batch in by_length(prompts, _BATCH_TOKENS):
        caches = prefill_rows(lm, [prompts[i] for i in batch], [positions[i] for i in batch], layers)
        found |= zip(batch, caches, strict=True)
    return [found[i] for i in range(len(prompts))]
