"""What a run will ask: every row of every task, of whom, and in which batches.

Batches depend on rows, lengths and batch size alone, so a run that goes on after it was killed, or with more systems than
before, gets the numbers of an uninterrupted one. Batches of a whole task hold each row's partner (see `partners`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.partners import Length, match, unmatchable


@dataclass(frozen=True)
class Batch:
    """Rows of one task that are asked together."""

    task: str
    systems: tuple[str, ...]
    """Who is asked, in this order."""
    items: tuple[Item, ...]
    lengths: tuple[int, ...]
    """Tokens of each row."""

    def __len__(self) -> int:
        return len(self.items)

    @property
    def tokens(self) -> int:
        """Padding included."""
        return len(self) * max(self.lengths)

    def part(self, start: int, stop: int) -> Batch:
        return replace(self, items=self.items[start:stop], lengths=self.lengths[start:stop])


@dataclass(frozen=True)
class Plan:
    """All batches in the order in which they are asked, the longest of each task first."""

    systems: tuple[str, ...]
    items: Mapping[str, Sequence[Item]]
    """By task, in the order of its sample."""
    batches: tuple[Batch, ...]

    def keys(self) -> Iterator[tuple[str, str, str]]:
        """(task, system, id) of every answer that is asked for, in order."""
        for batch in self.batches:
            for system in batch.systems:
                yield from ((batch.task, system, item.id) for item in batch.items)

    def rows(self) -> Counter[tuple[str, str]]:
        """How many rows of each task are asked of each system."""
        return Counter((task, system) for task, system, _ in self.keys())


def make_plan(
    tasks: Mapping[str, Sequence[Item]],
    systems: Sequence[str],
    length: Length,
    *,
    batch_size: int,
    limits: Mapping[str, int] | None = None,
    paired: Collection[str] = (),
) -> Plan:
    """Plan a run.

    Args:
        tasks: name → rows, in the order of the task's sample.
        systems: names, in the order in which they are to be asked the same batch.
        length: tokens of a row, for batches of rows of about the same length; the one that partners are chosen with.
        batch_size: most rows of a batch, at least 2. With 2, the triple of an odd number of rows is a batch of 3.
        limits: system → only the first so many rows of each task; of two limited systems one is asked a part of what
            the other is asked.
        paired: systems that need each row's partner in its batch. They cannot be limited.

    Raises:
        DataError: a task without rows, with an id twice or with rows of another task, an unknown or repeated system,
            numbers out of range, or rows that a paired system asks for and that cannot be matched.
    """
    limits = limits or {}
    _check(tasks, systems, batch_size, limits, paired)
    batches: list[Batch] = []
    for task, items in tasks.items():
        tokens = {item.id: length(item) for item in items}

        def measured(item: Item, tokens: Mapping[str, int] = tokens) -> int:
            return tokens[item.id]

        matched = match(items, measured) if paired or unmatchable(items) is None else None
        rows_of = {name: min(limits.get(name, len(items)), len(items)) for name in systems}
        for rows in sorted(set(rows_of.values()), reverse=True):
            asked = tuple(name for name in systems if rows_of[name] == rows)
            groups: Sequence[tuple[Item, ...]] = [(row,) for row in sorted(items[:rows], key=measured, reverse=True)]
            if matched is not None and rows == len(items):
                groups = matched
            for batch in _batches(groups, batch_size):
                batches.append(Batch(task, asked, batch, tuple(map(measured, batch))))
    return Plan(tuple(systems), dict(tasks), tuple(batches))


def _batches(groups: Sequence[tuple[Item, ...]], batch_size: int) -> Iterator[tuple[Item, ...]]:
    """Neighbouring groups, whole."""
    batch: tuple[Item, ...] = ()
    for group in groups:
        if batch and len(batch) + len(group) > batch_size:
            yield batch
            batch = ()
        batch += group
    yield batch


def _check(
    tasks: Mapping[str, Sequence[Item]],
    systems: Sequence[str],
    batch_size: int,
    limits: Mapping[str, int],
    paired: Collection[str],
) -> None:
    if not tasks or not systems:
        raise DataError("a run needs tasks and systems", got=f"{len(tasks)} tasks, {len(systems)} systems")
    if batch_size < 2:
        raise DataError("the batch size is too small", got=batch_size, allowed="2 or more: a row and its partner")
    if repeated := [name for name, n in Counter(systems).items() if n > 1]:
        raise DataError("a system is named twice", got=", ".join(repeated))
    if unknown := sorted({*limits, *paired} - {*systems}):
        raise DataError("a system that is not part of the run", got=", ".join(unknown), allowed=", ".join(systems))
    for name, limit in limits.items():
        if limit < 1:
            raise DataError(f"the limit of {name} is no positive number", got=limit)
        if name in paired:
            raise DataError(
                f"{name} cannot have a limit of its own",
                got=limit,
                hint="Its rows are paired over the whole sample: limit the sample instead",
            )
    for task, items in tasks.items():
        if not items:
            raise DataError(f"the task {task} has no rows")
        if repeated := [name for name, n in Counter(item.id for item in items).items() if n > 1]:
            raise DataError(f"ids of {task} occur more than once", got=", ".join(repeated[:3]))
        if strangers := [item for item in items if item.task != task]:
            raise DataError(
                f"a row of another task among those of {task}", got=f"{strangers[0].task}/{strangers[0].id}"
            )
