"""Filling a folder of shards with what is missing, in one process or several that share the work."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from cache2cache.errors import DataError
from cache2cache.models.disk import human
from cache2cache.models.shards import Shards

_SHARD_RECORDS = 64
_SHARD_BYTES = 128_000_000
"""A shard is written as soon as it has reached either: what a kill can cost, and what is held in memory."""

_SPARE = 1.05
"""Free space that is asked for, relative to what will be added."""


class Job(Protocol):
    """A record that is wanted."""

    @property
    def key(self) -> str: ...

    @property
    def tokens(self) -> int:
        """What must be read to compute it."""
        ...

    @property
    def size(self) -> int:
        """Bytes that it takes on disk."""
        ...


J = TypeVar("J", bound=Job)


def fill(
    shards: Shards,
    title: str,
    wanted: Sequence[J],
    held: Callable[[J], bool],
    batched: Callable[[Sequence[J]], Iterable[Sequence[J]]],
    compute: Callable[[Sequence[J]], Mapping[str, torch.Tensor]],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Compute and keep the records that are missing. Says first how much that is. With several processes, all call this.

    A record's last bits depend on its batch. Shards hold whole batches, so they do not depend on interruptions as long as
    `batched` splits what some of its batches leave over into just the others.

    Args:
        title: what messages call it.
        held: whether the shards have a record.
        batched: splits jobs into batches, the most expensive first, so that the time left is never underestimated.
        compute: the tensors of a batch, by name.
        metadata: of every shard.

    Raises:
        DataError: not enough space on the disk; processes that do not see each other's shards.
    """
    state = PartialState()
    shards.refresh()
    keys = _agreed(shards, title, [job for job in wanted if not held(job)], state)
    batches = list(batched([job for job in wanted if job.key in keys]))[state.process_index :: state.num_processes]
    console = Console(stderr=True)
    shown = state.is_main_process and console.is_terminal
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        disable=not shown,
    ) as bar:
        task = bar.add_task(title, total=sum(job.tokens for batch in batches for job in batch))
        shard: dict[str, torch.Tensor] = {}
        records = 0
        for batch in batches:
            shard |= compute(batch)
            records += len(batch)
            bar.advance(task, sum(job.tokens for job in batch))
            if records >= _SHARD_RECORDS or sum(tensor.nbytes for tensor in shard.values()) >= _SHARD_BYTES:
                shards.write(shard, metadata)
                shard, records = {}, 0
        if shard:
            shards.write(shard, metadata)
    state.wait_for_everyone()
    shards.refresh()
    missing = sum(not held(job) for job in wanted)
    if missing:
        raise DataError(
            f"{title}: what other processes have computed is not in {shards.folder}", got=f"{missing} missing",
            hint="All processes must see the same folder: put it on a file system that they share",
        )  # fmt: skip


def _agreed(shards: Shards, title: str, missing: Sequence[Job], state: PartialState) -> set[str]:
    """Keys of what will be computed, as the main process sees it: others may look later, when there is more."""
    verdict: list[Any] = [None]
    if state.is_main_process:
        try:
            if missing:
                shards.sweep()
                _announce(shards.folder, title, missing)
            verdict = [{job.key for job in missing}]
        except DataError as error:
            verdict = [error]
    (agreed,) = broadcast_object_list(verdict)
    if isinstance(agreed, DataError):
        raise agreed
    return agreed


def _announce(folder: Path, title: str, missing: Sequence[Job]) -> None:
    """Say what will be added, and raise DataError if the disk has no room for it."""
    size, tokens = sum(job.size for job in missing), sum(job.tokens for job in missing)
    Console(stderr=True).print(
        f"{title}: {len(missing):,} to compute ({tokens:,} tokens), {human(size)} to store, {human(_free(folder))} free",
        markup=False, highlight=False, soft_wrap=True,
    )  # fmt: skip
    check_disk(folder, title, size)


def check_disk(folder: Path, title: str, size: int) -> None:
    """Raise DataError unless the disk of a folder, which need not be there yet, has room for so many bytes of this title."""
    free = _free(folder)
    if size * _SPARE > free:
        raise DataError(
            f"no room for {title} on the disk of {folder}",
            got=f"{human(free)} free", allowed=f"at least {human(size * _SPARE)}",
            hint="Free some space, choose another folder, or train without one (--no-features)",
        )  # fmt: skip


def _free(folder: Path) -> int:
    return shutil.disk_usage(next(path for path in (folder, *folder.absolute().parents) if path.is_dir())).free
