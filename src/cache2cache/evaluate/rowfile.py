"""Files of records that are appended while a run goes on, one JSON object per line.

A process may be killed at any moment. What it was writing then is a line without its end, and never counts.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Generic, Self, TypeVar

from pydantic import BaseModel, ValidationError

from cache2cache.errors import DataError

Record = TypeVar("Record", bound=BaseModel)


def read_records(path: Path, kind: type[Record]) -> list[Record]:
    """All records that were written whole; none if there is no file.

    Raises:
        DataError: a whole line that is no such record.
    """
    records = []
    for number, line in enumerate(_whole_lines(path), 1):
        try:
            records.append(kind.model_validate_json(line))
        except ValidationError as error:
            found = error.errors()[0]
            where = ".".join(map(str, found["loc"]))
            raise DataError(
                f"{path}, line {number} is no {kind.__name__}",
                got=f"{where}: {found['msg']}" if where else found["msg"],
                hint="Delete the line; what it held is asked again",
            ) from error
    return records


class RecordFile(Generic[Record]):
    """A file of records, open for appending. Opening it cuts off a line without its end.

    Raises:
        DataError: a whole line that is no such record.
    """

    def __init__(self, path: Path, kind: type[Record]):
        self.path = path
        self.records = read_records(path, kind)
        """Those that were there when the file was opened."""
        size = sum(len(line) + 1 for line in _whole_lines(path))
        self._file = path.open("ab")
        self._file.truncate(size)

    def append(self, records: Sequence[Record]) -> None:
        """Write records in one go, and return when they are on the disk."""
        self._file.write("".join(f"{record.model_dump_json()}\n" for record in records).encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def _whole_lines(path: Path) -> list[bytes]:
    # Split at line feeds only: to splitlines, other characters that an answer may hold are ends as well.
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []
