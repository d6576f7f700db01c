"""From a task to its items: reading a split, checking every row, drawing a sample."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.tasks import files, hub
from cache2cache.evaluate.tasks.base import File, Loaded, Source, Split, Task


def load(
    task: Task, *, split: Split = "test", data_dir: Path | None = None, limit: int | None = None, seed: int | None = 0
) -> Loaded:
    """The rows of a split in an order drawn by the seed, all of them or a sample of `limit`.

    Another limit may draw other rows, not only fewer or more of the same.

    Every row is checked, those too that the sample leaves out. Rows without an id get their line's number (on the hub
    with several configs: config and number). Exact duplicates that a set is published with stay, as every published number
    counts them; what must differ is the id, by which a run is resumed.

    Args:
        data_dir: folder of data sets, `<set>/<split>.jsonl.zst` or `.jsonl`; None for the hub. A user's own file is read
            from where it lies.
        seed: None keeps the order in which they are published.

    Raises:
        DataError: no such split or file, a row of another form, two rows with one id, no rows left, a bad limit.
        DownloadError: the hub could not be reached.
        MissingExtraError: a library for the hub or for .zst files is not installed.
    """
    if limit is not None and limit < 1:
        raise DataError("a limit of rows must be positive", got=limit)
    if split not in task.sources:
        raise DataError(f"the task {task.name} has no {split} split", allowed=", ".join(task.sources))
    source = task.sources[split]
    if isinstance(source, File):
        place, rows = str(source.path), _local(source.path)
    elif data_dir is not None:
        path = find(data_dir, source)
        place, rows = str(path), _local(path)
    else:
        place, rows = f"{source.repo}@{source.revision}", _from_hub(task, source)
    items, dropped = _checked(task, split, rows)
    if not items:
        raise DataError(f"the task {task.name} has no rows to ask", got=f"{place}, left out: {dict(dropped)}")
    size = len(items) if limit is None else min(limit, len(items))
    chosen = items[:size] if seed is None else random.Random(seed).sample(items, size)
    return Loaded(chosen, dict(dropped.most_common()), place)


def find(data_dir: Path, source: Source) -> Path:
    """A split's file in a data folder.

    Raises:
        DataError: it is not there.
    """
    candidates = [data_dir / f"{source.path}{ending}" for ending in (".jsonl.zst", ".jsonl")]
    for path in candidates:
        if path.is_file():
            return path
    raise DataError(
        "the data folder lacks a file",
        got=data_dir,
        allowed=" or ".join(map(str, candidates)),
        hint="Without --data-dir the rows come from the hub",
    )


_Rows = Iterator[tuple[str, dict[str, Any]]]
"""Where a row lies, for error messages, and the row with its id."""


def _local(path: Path) -> _Rows:
    for number, row in files.rows_of(path):
        yield f"{path}, line {number}", {"id": str(number), **row}


def _from_hub(task: Task, source: Source) -> _Rows:
    for config, number, row in hub.rows_of(source):
        place = f"{source.repo}@{source.revision}, {config}/{source.split}, row {number}"
        try:
            local = task.from_hub(row, config)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise DataError(
                f"{place} has another layout than expected", got=f"{type(error).__name__}: {error}"
            ) from error
        yield place, {"id": f"{config}-{number}" if len(source.configs) > 1 else str(number), **local}


def _checked(task: Task, split: Split, rows: _Rows) -> tuple[list[Item], Counter[str]]:
    items: list[Item] = []
    dropped: Counter[str] = Counter()
    places: dict[str, str] = {}
    for place, row in rows:
        try:
            item = task.item(row)
        except DataError as error:
            raise DataError(f"{place}: {error.what}", got=error.got, allowed=error.allowed, hint=error.hint) from error
        if item.id in places:
            raise DataError(f"{place}: an id that another row has", got=item.id, hint=f"See {places[item.id]}")
        places[item.id] = place
        reason = task.reason_to_drop(row, split)
        if reason is None:
            items.append(item)
        else:
            dropped[reason] += 1
    return items, dropped
