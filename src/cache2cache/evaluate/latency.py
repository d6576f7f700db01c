"""Latency: one request at a time, one system after the other, nothing reused → latency.jsonl."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console

from cache2cache.errors import DataError
from cache2cache.evaluate import folder
from cache2cache.evaluate.asking import Asker
from cache2cache.evaluate.items import System
from cache2cache.evaluate.plan import Batch, Plan
from cache2cache.evaluate.progress import RunProgress
from cache2cache.evaluate.rowfile import RecordFile, read_records
from cache2cache.evaluate.runner import OnBatch
from cache2cache.evaluate.schema import LatencyRecord


def measure_latency(
    plan: Plan,
    systems: Sequence[System],
    out: Path,
    *,
    requests: int,
    settings: Mapping[str, Any],
    on_batch: OnBatch = lambda items: None,
    console: Console | None = None,
) -> list[str]:
    """Time the requests that out/latency.jsonl does not hold.

    Each system answers one request before, which does not count: the first one pays for much that later ones do not.
    A request that fails has no latency. It is reported on the console, and tried again when the run goes on.

    Args:
        requests: of each task, its first rows.
        settings: the run's, see `run`.
        on_batch: called with the row before each request, to drop everything that could be reused.
        console: for progress; stderr by default.

    Returns:
        "system on task" for each that answered none of the requests, so that it has no latency.

    Raises:
        EvaluationError: a system does not give one answer to one row, or the disk is full.
        DataError: see `folder.held` and `read_records`; `requests` is not positive.
    """
    if requests < 1:
        raise DataError("latency needs requests", got=requests, allowed="1 or more of each task")
    with folder.held(out, settings), RecordFile(out / folder.LATENCY, LatencyRecord) as file:
        done = {(record.task, record.system, record.id) for record in file.records}
        wanted = {system.name: _requests(plan, system.name, requests) for system in systems}
        missing = {name: [one for one in ones if _key(one) not in done] for name, ones in wanted.items()}
        left = Counter((one.task, name) for name, ones in missing.items() for one in ones)
        with RunProgress(left, sum(map(len, wanted.values())) - left.total(), console) as progress:
            for system in systems:
                _measure(system, missing[system.name], file, on_batch, progress)
        timed = {(record.task, record.system) for record in read_records(file.path, LatencyRecord)}
        return [f"{system} on {task}" for task, system in left if (task, system) not in timed]


def _measure(
    system: System,
    requests: Sequence[Batch],
    file: RecordFile[LatencyRecord],
    on_batch: OnBatch,
    progress: RunProgress,
) -> None:
    asker = Asker(system)
    if requests:
        on_batch(requests[0].items)
        asker.ask(requests[0])
    errors: Counter[str] = Counter()
    for one in requests:
        task, name, row = _key(one)
        progress.begin(task, name)
        on_batch(one.items)
        (reply,) = asker.ask(one)
        if reply.answer is None:
            errors[task] += 1
            progress.say(f"{task} · {name}: no latency of row {row}: {reply.error}")
        else:
            stages = {stage: seconds for stage, seconds in vars(reply.answer.timings).items() if seconds}
            file.append([LatencyRecord(task=task, id=row, system=name, seconds=reply.seconds, stages=stages)])
        progress.end(task, name, 1, errors[task])


def _requests(plan: Plan, system: str, count: int) -> list[Batch]:
    """The rows among the first of each task that the system is asked, each as a batch of one."""
    first = {(task, item.id) for task, items in plan.items.items() for item in items[:count]}
    return [
        replace(batch.part(i, i + 1), systems=(system,))
        for batch in plan.batches
        if system in batch.systems
        for i, item in enumerate(batch.items)
        if (batch.task, item.id) in first
    ]


def _key(request: Batch) -> tuple[str, str, str]:
    return request.task, request.systems[0], request.items[0].id
