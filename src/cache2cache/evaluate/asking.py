"""Asking one system one batch, whatever happens.

A batch that does not fit into memory is asked in halves. A batch that fails in another way is asked row by row, so that
one bad row costs one row. What fails alone is an error, which is data and no reason to stop: who counts them decides.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from cache2cache.errors import EvaluationError
from cache2cache.evaluate.items import Answer, Item, System
from cache2cache.evaluate.plan import Batch
from cache2cache.models.disk import is_full

T = TypeVar("T")

Tell = Callable[[str], object]
"""Takes one line for the person who waits."""


@dataclass(frozen=True)
class Reply:
    """What came of one row: an answer, or the error that stood in its way."""

    answer: Answer | None
    seconds: float = 0.0
    """Of the rows that were answered together, divided by their number."""
    error: str | None = None
    """Type and text of the exception."""


class Asker:
    """Asks one system, and remembers what was too large for it."""

    def __init__(self, system: System):
        self._system = system
        self._too_large = math.inf
        """Padded tokens of the smallest batch that did not fit into memory."""

    def ask(self, batch: Batch) -> list[Reply]:
        """One reply per row, in order.

        Raises:
            EvaluationError: the disk is full, or the system gave more or fewer answers than it was asked for, so that nobody
                knows which answer belongs to which row.
        """
        if len(batch) > 1 and batch.tokens >= self._too_large:
            return self._in_parts(batch, math.ceil(len(batch) / 2))
        try:
            return self._together(batch)
        except EvaluationError:
            raise
        except Exception as error:
            reply, too_large = Reply(None, error=_described(error)), _out_of_memory(error)
        # Out of the handler: the exception holds the tensors of the frames that it passed through.
        if too_large:
            _free_memory()
        if len(batch) == 1:
            return [reply]
        if too_large:
            self._too_large = batch.tokens
            return self._in_parts(batch, math.ceil(len(batch) / 2))
        return self._in_parts(batch, 1)

    def _together(self, batch: Batch) -> list[Reply]:
        answers = self._system.answer(batch.items)
        if len(answers) != len(batch):
            raise EvaluationError(
                f"{self._system.name} did not give one answer per row of {batch.task}",
                got=f"{len(answers)} answers to {len(batch)} rows",
                hint="This is a mistake in the system",
            )
        return [Reply(answer, answer.seconds / len(batch)) for answer in answers]

    def _in_parts(self, batch: Batch, size: int) -> list[Reply]:
        starts = range(0, len(batch), size)
        return [reply for start in starts for reply in self.ask(batch.part(start, start + size))]


def in_parts(
    items: Sequence[Item], size: int, ask: Callable[[Sequence[Item]], Sequence[T]]
) -> tuple[list[T | None], dict[str, str]]:
    """Ask something of many rows, `size` at a time, in smaller parts where they do not fit into memory.

    Returns:
        One result per row, None where it failed alone; and "task, row id" → why.

    Raises:
        EvaluationError: the disk is full, or every row failed.
    """
    found: list[T | None] = []
    failed: dict[str, str] = {}
    waiting = [items[start : start + size] for start in range(0, len(items), size)][::-1]
    while waiting:
        part = waiting.pop()
        if len(part) > size:
            waiting += [part[size:], part[:size]]
            continue
        try:
            found += ask(part)
            continue
        except Exception as error:
            reason, too_large = _described(error), _out_of_memory(error)
        if too_large:
            _free_memory()
        if len(part) == 1:
            found.append(None)
            failed[f"{part[0].task}, row {part[0].id}"] = reason
        elif too_large:
            size = math.ceil(len(part) / 2)
            waiting.append(part)
        else:
            waiting += [[item] for item in reversed(part)]
    if items and len(failed) == len(items):
        row, reason = next(iter(failed.items()))
        raise EvaluationError(f"none of {len(items)} rows could be asked", got=f"{row}: {reason}")
    return found, failed


def tell_left_out(tell: Tell, failed: Mapping[str, str], what: str) -> None:
    """Say which rows could not be asked and are left out of something."""
    if failed:
        row, reason = next(iter(failed.items()))
        others = f", and {len(failed) - 1} more" if len(failed) > 1 else ""
        tell(f"left out of {what}: {row}{others}: {reason}")


def _described(error: Exception) -> str:
    """Type and text of what went wrong with a row.

    Raises:
        EvaluationError: it is the machine's fault, not the row's: the disk is full.
    """
    if is_full(error):
        raise EvaluationError(
            "the disk is full", got=str(error), hint="Free some space and give the same command again"
        ) from error
    return f"{type(error).__name__}: {error}".removesuffix(": ")


def _out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    from accelerate.utils.memory import should_reduce_batch_size

    return should_reduce_batch_size(error)


def _free_memory() -> None:
    from accelerate.utils.memory import clear_device_cache

    clear_device_cache(garbage_collection=True)
