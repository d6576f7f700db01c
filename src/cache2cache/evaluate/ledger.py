"""What a run's row file holds of its plan: which rows are answered, and on how many each system failed."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate.plan import Batch, Plan
from cache2cache.evaluate.rowfile import RecordFile
from cache2cache.evaluate.schema import RowRecord

_TEXTS = 3


class Ledger:
    """Keeps account of the answers of a plan.

    Args:
        max_errors: largest share of a task's rows on which a system may fail.

    Raises:
        DataError: `max_errors` is no share, or a row stands in the file twice.
        EvaluationError: a system has failed on too many rows already.
    """

    def __init__(self, file: RecordFile[RowRecord], plan: Plan, max_errors: float):
        if not 0 <= max_errors <= 1:
            raise DataError("max_errors is no share of rows", got=max_errors, allowed="0 to 1")
        self._file, self._max_errors, self._planned = file, max_errors, plan.rows()
        self._waiting = set(plan.keys())
        self._errors: dict[tuple[str, str], list[str]] = defaultdict(list)
        if repeated := [key for key, n in Counter(map(_key, file.records)).items() if n > 1]:
            raise DataError(
                f"rows stand more than once in {file.path}",
                got=", ".join("/".join(key) for key in repeated[:_TEXTS]),
                hint="Delete all but one line of each",
            )
        self._count([record for record in file.records if _key(record) in self._waiting])
        for task, system in self._planned:
            self.check(task, system)

    def left(self) -> Counter[tuple[str, str]]:
        """(task, system) → rows that are not answered yet."""
        return Counter((task, system) for task, system, _ in self._waiting)

    def missing(self, batch: Batch, system: str) -> set[str]:
        """Ids of the batch's rows that the system has not answered yet."""
        return {item.id for item in batch.items if (batch.task, system, item.id) in self._waiting}

    def errors(self, task: str, system: str) -> int:
        return len(self._errors[task, system])

    def add(self, records: Sequence[RowRecord]) -> None:
        """Write new rows."""
        self._file.append(records)
        self._count(records)

    def check(self, task: str, system: str) -> None:
        """Stop if the system failed on too many rows of the task.

        Raises:
            EvaluationError: it did.
        """
        errors, rows = self._errors[task, system], self._planned[task, system]
        if len(errors) > self._max_errors * rows:
            raise EvaluationError(
                f"{system} failed on {len(errors)} of {rows} rows of {task}, {len(errors) / rows:.1%}",
                got=" | ".join(list(dict.fromkeys(errors))[:_TEXTS]),
                allowed=f"errors on at most {self._max_errors:.1%} of the rows",
                hint=f"All rows so far are kept. Delete those with an error from {self._file.path} to ask them again, or "
                "allow more errors",
            )

    def _count(self, records: Sequence[RowRecord]) -> None:
        for record in records:
            self._waiting.discard(_key(record))
            if record.error is not None:
                self._errors[record.task, record.system].append(record.error)


def _key(record: RowRecord) -> tuple[str, str, str]:
    return record.task, record.system, record.id
