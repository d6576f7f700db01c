"""Dropout of the sharer: rows that hear the mean of its features make a fuser robust and its gates meaningful."""

from __future__ import annotations

import torch

from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.train.heard import mean_features


class SharerDropout:
    """Lets random rows of a batch hear the mean sharer features in place of the sharer's cache.

    Args:
        rate: share of the rows, while training. At 1 it is every row, and not only while training.
        mean: statistics of the sharer's features, of its mapped layers only (`Geometry.only`).
    """

    def __init__(self, rate: float, mean: FeatureStatistics):
        self.rate, self.mean = rate, mean

    def __call__(self, theirs: torch.Tensor, positions: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Draws from torch's global generator of the CPU, which Trainer's checkpoints hold.

        Args:
            theirs: (2, U, B, H_s, W, D_s)
            positions: (B, W) position ids.
        Returns:
            As `theirs`; in float32 if some row was dropped.
        """
        if not training and self.rate < 1:
            return theirs
        rows = (torch.rand(len(positions)) < self.rate).nonzero().squeeze(-1).to(theirs.device)
        if not len(rows):
            return theirs
        return theirs.float().index_copy(2, rows, mean_features(self.mean, positions[rows]))
