"""Runs a plan: every row of every task × every system → rows.jsonl.

The file is the run's only memory. Rows that stand in it are never asked again, rows that do not are, in the batch in which
an uninterrupted run asks them. Knows no model and no metric.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console

from cache2cache.errors import DataError
from cache2cache.evaluate import folder
from cache2cache.evaluate.asking import Asker, Reply
from cache2cache.evaluate.items import Answer, Item, System
from cache2cache.evaluate.ledger import Ledger
from cache2cache.evaluate.plan import Plan
from cache2cache.evaluate.progress import RunProgress
from cache2cache.evaluate.rowfile import RecordFile
from cache2cache.evaluate.schema import RowRecord

OnBatch = Callable[[Sequence[Item]], object]


class Scored(Protocol):
    """What a task makes of an answer."""

    @property
    def extracted(self) -> str | None: ...
    @property
    def metrics(self) -> Mapping[str, float]: ...


class Scorer(Protocol):
    """The part of a task that a run needs."""

    @property
    def name(self) -> str: ...
    def score(self, item: Item, answer: Answer) -> Scored: ...


def run(
    plan: Plan,
    systems: Iterable[System],
    tasks: Iterable[Scorer],
    out: Path,
    *,
    settings: Mapping[str, Any],
    max_errors: float = 0.05,
    on_batch: OnBatch = lambda items: None,
    console: Console | None = None,
) -> None:
    """Ask everything that the plan holds and that out/rows.jsonl does not.

    A system is always asked whole batches, also where some of their rows stand in the file already, so that a resumed run
    gives the numbers of an uninterrupted one.

    Args:
        settings: everything that changes the numbers, as JSON; kept in out/run.json and compared when a run goes on.
        max_errors: largest share of a task's rows on which a system may fail.
        on_batch: called with the rows of a batch before the first system is asked, to drop what was kept of the last one.
        console: for progress; stderr by default.

    Raises:
        EvaluationError: a system failed on too many rows, or does not answer row by row. All rows so far stay.
        DataError: see `folder.held` and `read_records`; systems or tasks other than the plan's; a `max_errors` out of
            range.
    """
    asker_of, task_of = _named(plan, systems, tasks)
    with folder.held(out, settings), RecordFile(out / folder.ROWS, RowRecord) as file:
        ledger = Ledger(file, plan, max_errors)
        left = ledger.left()
        with RunProgress(left, plan.rows().total() - left.total(), console) as progress:
            for batch in plan.batches:
                missing = {name: rows for name in batch.systems if (rows := ledger.missing(batch, name))}
                if missing:
                    on_batch(batch.items)
                for name, rows in missing.items():
                    progress.begin(batch.task, name)
                    replies = zip(batch.items, asker_of[name].ask(batch), strict=True)
                    new = [(item, reply) for item, reply in replies if item.id in rows]
                    ledger.add([to_record(task_of[batch.task], item, name, reply) for item, reply in new])
                    progress.end(batch.task, name, len(new), ledger.errors(batch.task, name))
                    ledger.check(batch.task, name)


def to_record(scorer: Scorer, item: Item, system: str, reply: Reply) -> RowRecord:
    """A line of rows.jsonl. An answer with a number that is not finite is an error: nothing can be computed from it."""
    about: dict[str, Any] = {
        "task": item.task,
        "id": item.id,
        "subject": item.subject,
        "system": system,
        "target": item.target,
        "asked": item.asked,
    }
    answer = reply.answer
    if answer is None:
        return RowRecord(**about, error=reply.error)
    scored = scorer.score(item, answer)
    numbers = {**scored.metrics, **{f"letter_logprobs[{i}]": x for i, x in enumerate(answer.letter_logprobs)}}
    if broken := [f"{name} is {number}" for name, number in numbers.items() if not math.isfinite(number)]:
        return RowRecord(**about, error=f"FloatingPointError: {', '.join(broken)}")
    return RowRecord(
        **about,
        answer=answer.text,
        extracted=scored.extracted,
        metrics=dict(scored.metrics),
        letter_logprobs=list(answer.letter_logprobs),
        ended=answer.ended,
        message=answer.message,
        route=answer.route,
        seconds=reply.seconds,
        **asdict(answer.cost),
    )


def _named(
    plan: Plan, systems: Iterable[System], tasks: Iterable[Scorer]
) -> tuple[dict[str, Asker], dict[str, Scorer]]:
    asker_of = {system.name: Asker(system) for system in systems}
    task_of = {task.name: task for task in tasks}
    for what, given, planned in (("systems", asker_of, plan.systems), ("tasks", task_of, plan.items)):
        if set(given) != set(planned):
            raise DataError(f"other {what} than the plan's", got=", ".join(given), allowed=", ".join(planned))
    return asker_of, task_of
