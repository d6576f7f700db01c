"""What a fuser hears in training: the sharer's cache, another row's, or the mean of its features."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.train.batch import grid, grid_width


@dataclass(frozen=True)
class Heard:
    """A sharer's side of a batch. W columns are fused in some row, U of the sharer's layers are mapped."""

    theirs: torch.Tensor
    """(2, U, B, H_s, W, D_s) its cache at the aligned positions."""
    positions: torch.Tensor
    """(B, W) position ids of those."""
    due: torch.Tensor
    """(B, N) when each of the receiver's columns is fused, as in `inputs.SharerInputs`."""

    def mismatched(self) -> Heard:
        """Each row hears the next one, and the last row the first. Rows end in the same column, so the caches are aligned
        from the right; where only one of the two rows is fused, nothing is heard.
        """
        width = grid_width(self.due)
        both = self.due.clone()
        grid(both, width).mul_((grid(self.due, width) > 0).roll(-1, 0))
        return replace(self, theirs=self.theirs.roll(-1, 2), positions=self.positions.roll(-1, 0), due=both)

    def zeroed(self, mean: FeatureStatistics) -> Heard:
        """Every row hears the mean features at its own positions."""
        return replace(self, theirs=mean_features(mean, self.positions))


def mean_features(statistics: FeatureStatistics, positions: torch.Tensor) -> torch.Tensor:
    """The mean cache at each position, in float32: rounded to fewer bits, rotated means would tell their positions.

    Args:
        positions: (B, W)
    Returns:
        (2, U, B, H, W, D)
    """
    return statistics.mean_cache(positions.flatten()).unflatten(3, positions.shape).transpose(2, 3)
