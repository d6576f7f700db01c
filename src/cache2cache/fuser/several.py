"""Fusing the caches of one or several sharers into the receiver's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from cache2cache.fuser.base import Fuser

FusionMode = Literal["parallel", "sequential"]
"""parallel: the sum of all deltas, each computed from the clean receiver cache. sequential: one after another."""


@dataclass(frozen=True)
class Speaker:
    """One sharer's part in a fusion."""

    fuser: Fuser
    kv: torch.Tensor
    """(2, L_r, B, H_s, P, D_s) the sharer's cache, one layer per receiver layer, at the aligned positions."""
    positions: torch.Tensor
    """(B, P) position ids of those."""
    mask: torch.Tensor
    """(B, P) bool, where this sharer is heard."""


def fused_kv(
    own: torch.Tensor, own_positions: torch.Tensor, speakers: Sequence[Speaker], mode: FusionMode = "parallel"
) -> torch.Tensor:
    """The fused cache at the fused positions, in the receiver's dtype.

    Args:
        own: (2, L_r, B, H_r, P, D_r) the receiver's clean cache.
        own_positions: (B, P) position ids.
    """
    clean, fused = own, own.flatten(0, 1)
    for speaker in speakers:
        source = clean if mode == "parallel" else fused.to(own.dtype).view_as(own)
        entries, value = speaker.fuser.delta(source, speaker.kv, own_positions, speaker.positions, speaker.mask)
        if len(entries) == len(fused):
            fused = fused + value
        elif len(entries):
            fused = fused.to(value.dtype).index_add(0, entries, value)
    return fused.to(own.dtype).view_as(own)
