"""Rows and latencies of a run → its report."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from cache2cache.errors import DataError
from cache2cache.evaluate import comparisons, stats
from cache2cache.evaluate.schema import (
    Estimate,
    LatencyRecord,
    LatencySummary,
    Report,
    RowRecord,
    SystemSummary,
    TaskSummary,
)
from cache2cache.evaluate.scores import Answers, Scores, estimate, score
from cache2cache.evaluate.tasks.base import METRICS, Metric

_BY_LETTER = "likelihood"  # the metric of rows that have letter likelihoods
_BY_TEXT = {"generate", "correct", "em"}  # metrics of rows that were asked for text
_TOKENS = ("receiver_read", "sharer_read", "receiver_wrote", "sharer_wrote")


@dataclass(frozen=True)
class TaskInfo:
    """What a report says of a task that its rows do not."""

    title: str
    kind: str
    licence: str
    source: str
    dropped: Mapping[str, int]
    """Rows left out, by reason."""
    metrics: Sequence[str]
    """Names in `METRICS`, all that the task's rows have."""
    primary: str
    """The one of them that tables and figures show first."""

    def __post_init__(self) -> None:
        if unknown := [name for name in self.metrics if name not in METRICS]:
            raise DataError(f"{self.title}: unknown metrics", got=", ".join(unknown), allowed=", ".join(METRICS))
        if self.primary not in self.metrics:
            raise DataError(
                f"{self.title}: the primary metric is not one of the task's",
                got=self.primary,
                allowed=", ".join(self.metrics),
            )


def summarise(
    rows: Sequence[RowRecord], latency: Sequence[LatencyRecord], tasks: Mapping[str, TaskInfo], run: Mapping[str, Any]
) -> Report:
    """The report of a run. The order of rows and latencies does not matter.

    Errors count as wrong, see `scores.score`, and as rows. All else that is said of a system's answers (format
    failures, cut off, calibration, agreement, routing, tokens, bytes) is said of the rows that it answered without an
    error.

    Args:
        rows: one per task, system and row id; systems may have answered different rows.
        latency: single requests.
        tasks: name → task, in the order of the report.
        run: goes into the report as it is.

    Raises:
        DataError: an answer that occurs twice, a task that is unknown or has no rows, and what `scores.score` refuses.
    """
    answers: dict[str, dict[str, dict[str, RowRecord]]] = {task: {} for task in tasks}
    for row in sorted(rows, key=lambda row: (row.system, row.id)):
        known = answers[_known(row.task, tasks)].setdefault(row.system, {})
        if row.id in known:
            raise DataError("an answer occurs twice", got=f"{row.task}, row {row.id}, {row.system}")
        known[row.id] = row
    if empty := [task for task, found in answers.items() if not found]:
        raise DataError("a task has no rows", got=", ".join(empty), hint="Leave the task out, or run it.")
    return Report(
        run=dict(run),
        tasks={name: _task(info, answers[name]) for name, info in tasks.items()},
        latency=_latency(latency, tasks),
    )


def _task(info: TaskInfo, answers: Answers) -> TaskSummary:
    metrics = [METRICS[name] for name in info.metrics]
    scores, primary = score(answers, metrics), METRICS[info.primary]
    return TaskSummary(
        title=info.title,
        kind=info.kind,
        licence=info.licence,
        source=info.source,
        rows=len(set().union(*answers.values())),
        dropped=dict(info.dropped),
        primary=info.primary,
        lower_is_better=[metric.name for metric in metrics if metric.lower_is_better],
        systems={system: _system(system, answers, scores, metrics) for system in answers},
        pairs=comparisons.pairs(scores, metrics),
        gap_recovered=comparisons.gaps(scores, primary),
        transfer=comparisons.transfers(scores, metrics, info.title),
        subjects=_subjects(answers, scores, primary),
    )


def _system(name: str, answers: Answers, scores: Scores, metrics: Sequence[Metric]) -> SystemSummary:
    values, rows = scores[name], answers[name]
    answered = [row for row in rows.values() if row.error is None]
    summary = SystemSummary(
        rows=len(rows),
        errors=len(rows) - len(answered),
        metrics={
            metric.name: estimate(metric, [*values[metric.name].values()])
            for metric in metrics
            if metric.name in values
        },
    )
    if not answered:
        return summary
    if not _BY_TEXT.isdisjoint(values):
        summary.format_failures = stats.wilson([row.extracted is None for row in answered])
        summary.cut_off = stats.wilson([not row.ended for row in answered])
    if _BY_LETTER in values:
        right = [row.metrics[_BY_LETTER] for row in answered]
        summary.calibration_error = stats.calibration_error([row.letter_logprobs for row in answered], right)
        summary.agreement_with_sharer = None if name == "sharer" else _agreement(answered, answers.get("sharer", {}))
    if routes := [row.route == "sharer" for row in answered if row.route is not None]:
        summary.routed_to_sharer = float(np.mean(routes))
    summary.tokens = {kind: float(np.mean([getattr(row, kind) for row in answered])) for kind in _TOKENS}
    summary.cache_bytes = float(np.mean([row.cache_bytes for row in answered]))
    summary.text_bytes = float(np.mean([row.text_bytes for row in answered]))
    return summary


def _agreement(answered: Sequence[RowRecord], sharer: Mapping[str, RowRecord]) -> Estimate | None:
    """On the rows for which both have letter likelihoods."""
    both = [(row, sharer[row.id]) for row in answered if row.id in sharer and sharer[row.id].letter_logprobs]
    same = [np.argmax(own.letter_logprobs) == np.argmax(other.letter_logprobs) for own, other in both]
    return stats.wilson(same) if same else None


def _subjects(answers: Answers, scores: Scores, primary: Metric) -> dict[str, dict[str, Estimate]]:
    """Empty for a task of a single subject."""
    values: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for system, rows in answers.items():
        for row_id, value in scores[system].get(primary.name, {}).items():
            values[rows[row_id].subject][system].append(value)
    if len(values) < 2:
        return {}
    return {
        subject: {system: estimate(primary, found) for system, found in values[subject].items()}
        for subject in sorted(values)
    }


def _latency(records: Sequence[LatencyRecord], tasks: Mapping[str, TaskInfo]) -> dict[str, LatencySummary]:
    """By system, over all tasks. A stage that a request did not have took no time."""
    by_system: dict[str, list[LatencyRecord]] = defaultdict(list)
    for record in sorted(records, key=lambda r: (r.system, r.task, r.id, r.seconds)):
        _known(record.task, tasks)
        by_system[record.system].append(record)
    return {system: _latency_of(found) for system, found in by_system.items()}


def _latency_of(records: Sequence[LatencyRecord]) -> LatencySummary:
    seconds = [record.seconds for record in records]
    p50, p90, p99 = stats.percentiles(seconds, (50, 90, 99))
    stages = sorted({stage for record in records for stage in record.stages})
    return LatencySummary(
        n=len(records),
        mean=float(np.mean(seconds)),
        p50=p50,
        p90=p90,
        p99=p99,
        stages={stage: float(np.mean([record.stages.get(stage, 0.0) for record in records])) for stage in stages},
    )


def _known(task: str, tasks: Mapping[str, TaskInfo]) -> str:
    if task not in tasks:
        raise DataError("a row of a task that is not part of the run", got=task, allowed=", ".join(tasks))
    return task
