"""Rows of one task as numbers to count with: what an error is worth, and which interval a metric gets."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from cache2cache.errors import DataError
from cache2cache.evaluate import stats
from cache2cache.evaluate.resampling import Limits
from cache2cache.evaluate.schema import Estimate, RowRecord
from cache2cache.evaluate.tasks.base import Metric

Answers = Mapping[str, Mapping[str, RowRecord]]
"""System → row id → its answer. Systems may have answered different rows."""
Scores = Mapping[str, Mapping[str, Mapping[str, float]]]
"""System → metric → row id → number."""


def limits(metric: Metric) -> Limits | None:
    """The worst and the best number that a row could have: 0 and 1 where more is better, None where less is."""
    return None if metric.lower_is_better else (0.0, 1.0)


def estimate(metric: Metric, values: Sequence[float]) -> Estimate:
    """Wilson's interval for a binary metric, a bootstrap interval of the mean for others."""
    return stats.wilson(values) if metric.binary else stats.mean(values, limits(metric))


def score(answers: Answers, metrics: Sequence[Metric]) -> Scores:
    """Every number of every system.

    An error is 0 in metrics of which more is better. Where less is better, as for nats, it has no number and is left
    out; `SystemSummary.errors` counts it all the same. A system that answered nothing but errors is wrong in every
    metric of the task of which more is better.

    Raises:
        DataError: a row with a metric that its task does not have, without one that the system's other rows have, or
            with a number that is not finite.
    """
    return {system: dict(_of_system(rows, metrics)) for system, rows in answers.items()}


def common(scores: Scores, metric: Metric, *systems: str) -> list[list[float]]:
    """The systems' numbers on the rows for which each of them has one, row by row. Lists are empty without such rows."""
    columns = [scores.get(system, {}).get(metric.name, {}) for system in systems]
    rows = [row for row in columns[0] if all(row in column for column in columns)]
    return [[column[row] for row in rows] for column in columns]


def _of_system(rows: Mapping[str, RowRecord], metrics: Sequence[Metric]) -> dict[str, dict[str, float]]:
    answered = [row for row in rows.values() if row.error is None]
    measured = {name for row in answered for name in row.metrics}
    if unknown := measured - {metric.name for metric in metrics}:
        names = ", ".join(metric.name for metric in metrics)
        raise DataError(
            f"rows of {answered[0].task} have metrics of another task", got=", ".join(sorted(unknown)), allowed=names
        )
    found = {}
    for metric in metrics:
        if answered and metric.name not in measured:
            continue
        values = {name: value for name, row in rows.items() if (value := _value(row, metric)) is not None}
        if values:
            found[metric.name] = values
    return found


def _value(row: RowRecord, metric: Metric) -> float | None:
    if row.error is not None:
        return None if metric.lower_is_better else 0.0
    value = row.metrics.get(metric.name, math.nan)
    if not math.isfinite(value):
        raise DataError(
            f"{row.task}, row {row.id}: {row.system} has no number in {metric.name}",
            got=row.metrics,
            hint="A system that failed on a row is an error there.",
        )
    return value
