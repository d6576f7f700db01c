"""Estimates with 95 % intervals from one number per row. Knows nothing of tasks, systems or files.

Bootstrap intervals are percentile intervals of 9,999 resamples of rows with a fixed seed. Not BCa: for 0/1 data of which
few rows differ its correction moves the interval further from zero, and where no row differs it is undefined.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

from cache2cache.errors import DataError
from cache2cache.evaluate.resampling import (
    FEWEST_ROWS,
    LEVEL,
    Array,
    Limits,
    percentile_interval,
    resampled_means,
    unresampled_interval,
)
from cache2cache.evaluate.schema import Estimate

BINS = 10
"""Of the calibration error."""


def wilson(right: ArrayLike) -> Estimate:
    """The share of rows that are right, with Wilson's score interval (Newcombe 1998, method 3).

    Args:
        right: (n,) 0 or 1 per row.

    Raises:
        DataError: no rows, or a number that is neither 0 nor 1.
    """
    rows = _binary(right)
    interval = stats.binomtest(int(rows.sum()), len(rows)).proportion_ci(LEVEL, method="wilson")
    return _estimate(rows.mean(), (interval.low, interval.high), len(rows))


def mean(values: ArrayLike, limits: Limits | None = None) -> Estimate:
    """The mean, with its bootstrap interval.

    Args:
        values: (n,) one number per row.
        limits: what a row's number could be; None for anything. With them the interval of rows that are all the same
            has a width: that 20 rows score 1 does not promise that the next one will.

    Raises:
        DataError: no rows, or a number that is not finite or outside the limits.
    """
    rows = _numbers(values, limits)
    if len(rows) < FEWEST_ROWS or (limits is not None and np.ptp(rows) == 0):
        return _estimate(rows.mean(), unresampled_interval(rows, limits), len(rows))
    (means,) = resampled_means(rows[None])
    return _estimate(rows.mean(), percentile_interval(means, len(rows)), len(rows))


def paired(a: ArrayLike, b: ArrayLike, limits: Limits | None = None) -> Estimate:
    """The mean of a − b over the same rows, with its bootstrap interval.

    Where only a handful of 0/1 rows differ the interval is somewhat too narrow; `mcnemar` errs on the other side.

    Args:
        a: (n,) one number per row.
        b: (n,) the other system's, row by row.
        limits: what a number of a or b could be; None for anything.

    Raises:
        DataError: no rows, not as many on both sides, or a number that is not finite or outside the limits.
    """
    first, second = _aligned(_numbers(a, limits), _numbers(b, limits))
    return mean(first - second, limits and (limits[0] - limits[1], limits[1] - limits[0]))


def mcnemar(a: ArrayLike, b: ArrayLike) -> tuple[float, int, int]:
    """McNemar's exact test of whether a and b are right equally often.

    Args:
        a: (n,) 0 or 1 per row.
        b: (n,) the other system's, row by row.

    Returns:
        The two-sided p, 1 where no row differs; the rows that only a gets right; the rows that only b gets right.

    Raises:
        DataError: no rows, not as many on both sides, or a number that is neither 0 nor 1.
    """
    first, second = _aligned(_binary(a), _binary(b))
    only_a, only_b = int((first > second).sum()), int((first < second).sum())
    p = float(stats.binomtest(only_a, only_a + only_b).pvalue) if only_a + only_b else 1.0
    return p, only_a, only_b


def gap_recovered(
    system: ArrayLike, receiver: ArrayLike, sharer: ArrayLike, limits: Limits | None = None
) -> Estimate | None:
    """(system − receiver) / (sharer − receiver) in means over the same rows, with its bootstrap interval.

    The same where less is better, since both differences change sign. The interval has no width if the system does on
    every row what the receiver does, or what the sharer does.

    Args:
        system: (n,) one number per row; `receiver` and `sharer` likewise.
        limits: what a number could be; None for anything.

    Returns:
        None for fewer than five rows, and where the interval of sharer − receiver contains zero: the ratio could then
        be anything.

    Raises:
        DataError: as for `paired`.
    """
    own, baseline, other = (_numbers(values, limits) for values in (system, receiver, sharer))
    gain, gap = np.subtract(*_aligned(own, baseline)), paired(other, baseline, limits)
    if len(gain) < FEWEST_ROWS or gap.low <= 0 <= gap.high:
        return None
    gains, gaps = resampled_means(np.stack([gain, other - baseline]))
    # An interval without zero leaves at most one draw in forty whose gap is zero or turned round.
    kept = np.sign(gaps) == np.sign(gap.value)
    return _estimate(gain.mean() / gap.value, percentile_interval(gains[kept] / gaps[kept], len(gain)), len(gain))


def calibration_error(logprobs: Sequence[Sequence[float]], right: ArrayLike) -> float:
    """Expected calibration error over ten equal bins of confidence: Σ_m |B_m| / n · |acc(B_m) − conf(B_m)|.

    B_m are the rows whose confidence, the probability of the likeliest letter, lies in ((m − 1) / 10, m / 10].
    Source: Guo et al. 2017, arXiv 1706.04599, eq. 3.

    Args:
        logprobs: (n, letters) of the valid letters, normalised over them; rows may have different letters.
        right: (n,) whether the likeliest letter is the right one, 0 or 1.

    Raises:
        DataError: no rows, not as many on both sides, a row without letters, or a probability above 1.
    """
    if not all(map(len, logprobs)):
        raise DataError(
            "a row has no letter likelihoods", hint="Only rows that were scored by letters have confidence."
        )
    likeliest, outcomes = _aligned(_numbers([max(row) for row in logprobs]), _binary(right))
    if likeliest.max() > 1e-6:
        raise DataError("a letter's probability is above 1", got=f"log-probability {likeliest.max()}", allowed="≤ 0")
    confidence = np.exp(likeliest)
    bins = np.clip(np.ceil(confidence * BINS).astype(int) - 1, 0, BINS - 1)
    return float(np.abs(np.bincount(bins, outcomes - confidence)).sum() / len(outcomes))


def percentiles(values: ArrayLike, percents: Sequence[float]) -> list[float]:
    """The values that so many per cent of the values lie below, interpolated linearly between neighbours.

    Raises:
        DataError: no values, or one that is not finite.
    """
    return np.percentile(_numbers(values), percents).tolist()


def _estimate(value: float, interval: tuple[float, float], rows: int) -> Estimate:
    return Estimate(value=float(value), low=float(interval[0]), high=float(interval[1]), n=rows)


def _numbers(values: ArrayLike, limits: Limits | None = None) -> Array:
    """(n,) finite numbers within the limits, n ≥ 1."""
    rows = np.asarray(values, dtype=np.float64)
    if rows.ndim != 1 or not rows.size:
        raise DataError("statistics need rows, with one number each", got=f"shape {rows.shape}", allowed="(n,), n ≥ 1")
    low, high = limits or (-math.inf, math.inf)
    if (wrong := rows[~(np.isfinite(rows) & (low <= rows) & (rows <= high))]).size:
        raise DataError(
            "a row has an impossible number",
            got=wrong[0],
            allowed=f"finite, {low} to {high}",
            hint="A system that failed on a row is an error there, not a number.",
        )
    return rows


def _binary(values: ArrayLike) -> Array:
    rows = _numbers(values)
    if (wrong := rows[(rows != 0) & (rows != 1)]).size:
        raise DataError("a row is neither right nor wrong", got=wrong[0], allowed="0 or 1")
    return rows


def _aligned(a: Array, b: Array) -> tuple[Array, Array]:
    if len(a) != len(b):
        raise DataError("both sides need the same rows", got=f"{len(a)} and {len(b)} rows", allowed="equally many")
    return a, b
