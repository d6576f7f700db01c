"""A few rows to look at, with what every system answered."""

from __future__ import annotations

import hashlib
import math
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cache2cache.errors import DataError
from cache2cache.evaluate.report.numbers import words
from cache2cache.evaluate.report.order import ordered
from cache2cache.evaluate.report.rows import by_key, right
from cache2cache.evaluate.schema import Report, RowRecord

MOST = 200
"""Rows over all tasks."""


@dataclass(frozen=True)
class SampledAnswer:
    """One system's answer, as it is shown."""

    system: str
    right: bool | None
    row: RowRecord
    letters: tuple[tuple[str, float], ...]
    """Probability of each letter, normalised over the valid ones."""
    metrics: str


@dataclass(frozen=True)
class Sample:
    """One row of a task."""

    task: str
    id: str
    subject: str
    question: str
    target: str
    answers: tuple[SampledAnswer, ...]

    @property
    def right(self) -> list[str]:
        return [answer.system for answer in self.answers if answer.right is True]

    @property
    def wrong(self) -> list[str]:
        return [answer.system for answer in self.answers if answer.right is False]


def sample(report: Report, rows: Sequence[RowRecord], questions: Mapping[tuple[str, str], str]) -> list[Sample]:
    """At most `MOST` rows, an equal share of each task, those on which systems disagree first.

    Which rows are drawn depends on their ids alone, not on the order in which they were answered.

    Raises:
        DataError: a row of a task that the report lacks, a row that one system answered twice, or a row that is shown
            and whose question is not given.
    """
    grouped: dict[str, dict[str, dict[str, RowRecord]]] = {name: {} for name in report.tasks}
    for (task, row_id, system), row in by_key(rows).items():
        if task not in grouped:
            raise DataError("a row of a task that the report lacks", got=task, allowed=", ".join(grouped) or None)
        grouped[task].setdefault(row_id, {})[system] = row
    found: list[Sample] = []
    left = len(grouped)
    # Small tasks first, so that what they leave of their share goes to the larger ones.
    for task in sorted(grouped, key=lambda name: (len(grouped[name]), name)):
        share = (MOST - len(found)) // left
        left -= 1
        made = [_sample(report, answered, questions) for answered in _chosen(report, grouped[task], share)]
        found += sorted(made, key=lambda one: one.id)
    order = list(report.tasks)
    return sorted(found, key=lambda one: order.index(one.task))


def _chosen(
    report: Report, answered: Mapping[str, Mapping[str, RowRecord]], most: int
) -> list[Mapping[str, RowRecord]]:
    def rank(found: Mapping[str, RowRecord]) -> tuple[bool, str]:
        verdicts = {right(row, report.tasks[row.task]) for row in found.values()}
        one = next(iter(found.values()))
        return len(verdicts) < 2, hashlib.sha256(f"{one.task}\n{one.id}".encode()).hexdigest()

    return sorted(answered.values(), key=rank)[:most]


def _sample(report: Report, found: Mapping[str, RowRecord], questions: Mapping[tuple[str, str], str]) -> Sample:
    one = next(iter(found.values()))
    if (one.task, one.id) not in questions:
        raise DataError(
            "a row has no question", got=f"{one.task}, {one.id}", hint="Give the text of every row answered"
        )
    answers = []
    for system in ordered(found):
        row = found[system]
        letters = zip(string.ascii_uppercase, map(math.exp, row.letter_logprobs), strict=False)
        metrics = ", ".join(f"{words(name)} {value:.3g}" for name, value in row.metrics.items())
        answers.append(SampledAnswer(system, right(row, report.tasks[row.task]), row, tuple(letters), metrics))
    question = questions[one.task, one.id]
    return Sample(one.task, one.id, one.subject, question, one.target, tuple(answers))
