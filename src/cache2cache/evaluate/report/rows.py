"""Rows looked up, and when one of them counts as right."""

from __future__ import annotations

from collections.abc import Iterable

from cache2cache.errors import DataError
from cache2cache.evaluate.schema import RowRecord, TaskSummary

Key = tuple[str, str, str]
"""Task, id, system."""


def by_key(rows: Iterable[RowRecord]) -> dict[Key, RowRecord]:
    """Rows by what they answer.

    Raises:
        DataError: a system answered a row twice.
    """
    found: dict[Key, RowRecord] = {}
    for row in rows:
        key = (row.task, row.id, row.system)
        if key in found:
            raise DataError(
                "a system answered a row twice", got=", ".join(key), allowed="one line per task, id and system"
            )
        found[key] = row
    return found


def right(row: RowRecord, task: TaskSummary) -> bool | None:
    """Whether the row has full marks in the task's primary metric; None where less is better and nothing is right.

    An error is wrong.
    """
    if task.primary in task.lower_is_better:
        return None
    return row.error is None and row.metrics.get(task.primary) == 1
