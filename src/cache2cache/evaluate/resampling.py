"""The bootstrap behind the estimates of `stats`: resampled means and the interval between their percentiles."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray
from scipy import stats

LEVEL = 0.95
RESAMPLES = 9_999
FEWEST_ROWS = 5
"""Fewer are not resampled: resamples never leave the range of the rows, and that of four rows holds the mean of a
symmetric distribution in 1 − 2 / 2⁴ of cases at most, which is less than 95 %."""
_ROWS_PER_LEVEL = 16  # to draw how often a distinct row comes up takes about as long as to draw so many rows
_NUMBERS_AT_A_TIME = 250_000  # stay in the processor's cache

Array = NDArray[np.float64]
Limits = tuple[float, float]
"""The lowest and the highest number that a row could have."""


def resampled_means(columns: Array) -> Array:
    """Means over rows drawn with replacement, the same rows for every column: (c, n) → (c, 9,999).

    The seed is fixed: the same rows give the same means, in whichever order they come.
    """
    rng, rows = np.random.default_rng(0), columns.shape[1]
    levels, counts = np.unique(columns, axis=1, return_counts=True)
    if len(counts) * _ROWS_PER_LEVEL <= rows:
        drawn = rng.multinomial(rows, counts / rows, size=RESAMPLES)
        return levels @ drawn.T / rows
    result = stats.bootstrap(
        tuple(np.repeat(levels, counts, axis=1)),
        lambda *resamples, axis: np.stack([resample.mean(axis) for resample in resamples]),
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        batch=max(1, _NUMBERS_AT_A_TIME // rows),
        method="percentile",
        rng=rng,
    )
    return result.bootstrap_distribution


def percentile_interval(draws: Array, rows: int) -> tuple[float, float]:
    """The expanded percentile interval (Hesterberg 2014, arXiv 1411.5279).

    Plain 2.5 and 97.5 percentiles lie too close together for few rows. These are moved apart so that for normal draws
    they are the limits of Student's interval.

    Args:
        draws: (resamples,) the bootstrap distribution.
        rows: how many rows each draw is made of, at least 2.
    """
    tail = stats.norm.cdf(stats.t.ppf((1 - LEVEL) / 2, rows - 1) * math.sqrt(rows / (rows - 1)))
    low, high = np.quantile(draws, [tail, 1 - tail])
    return float(low), float(high)


def unresampled_interval(rows: Array, limits: Limits | None) -> tuple[float, float]:
    """An interval of the mean for rows of which resamples say too little: all the same, or fewer than five.

    With limits: other rows, as large a share as Wilson's upper limit of 0 in n, may lie anywhere within the limits.
    Without: Student's t, and for a single row x the interval x ± 9.68 |x|, which in 95 % of cases covers the mean of a
    normal distribution whatever that and the variance are (Wall, Boen and Tweedie 2001, The American Statistician 55).

    Args:
        rows: (n,), n ≥ 1.
    """
    n, middle = len(rows), float(rows.mean())
    if limits is not None:
        unseen = stats.binomtest(0, n).proportion_ci(LEVEL, method="wilson").high
        low, high = (
            (1 - unseen) * end + unseen * limit for end, limit in zip((rows.min(), rows.max()), limits, strict=True)
        )
        return float(low), float(high)
    half = 9.68 * abs(middle) if n == 1 else stats.t.ppf((1 + LEVEL) / 2, n - 1) * rows.std(ddof=1) / math.sqrt(n)
    return middle - half, middle + half
