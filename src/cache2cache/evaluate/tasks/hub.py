"""Rows of public data sets from the hub, at pinned revisions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from cache2cache.errors import DataError, DownloadError, MissingExtraError
from cache2cache.evaluate.tasks.base import Source


def rows_of(source: Source) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Config, row number in it counted from 1, and row.

    Raises:
        DownloadError, DataError, MissingExtraError: see `open_rows`.
    """
    for config in source.configs:
        rows = open_rows(source.repo, config, source.split, source.revision)
        yield from ((config, number, row) for number, row in rows)


def open_rows(
    repo: str, config: str | None, split: str, revision: str | None, *, streaming: bool = False
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Row number, counted from 1, and row.

    Args:
        config: the part of the data set, None for its default.
        streaming: fetch rows while they are read, and not before.

    Raises:
        DownloadError: the hub, the repository or the revision cannot be reached.
        DataError: the repository has no such config or split.
        MissingExtraError: the library datasets is not installed.
    """
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(
            "reading data sets from the hub needs datasets",
            hint="pip install 'cache2cache[eval]' or 'cache2cache[train]', or give a folder of data sets with --data-dir",
        ) from error
    place = f"{repo}@{revision}, {config}/{split}"
    try:
        rows = datasets.load_dataset(repo, config, split=split, revision=revision, streaming=streaming)
        yield from ((number, dict(row)) for number, row in enumerate(rows, 1))
    except ValueError as error:  # an unknown config or split
        raise DataError(f"the data set {place} is not there", got=error) from error
    # Whatever else goes wrong between here and the hub: connections, HTTP statuses, disks, damaged files.
    except Exception as error:
        raise DownloadError(
            f"the data set {place} could not be fetched",
            got=f"{type(error).__name__}: {error}",
            hint="Check the network, or give a folder of data sets with --data-dir",
        ) from error
