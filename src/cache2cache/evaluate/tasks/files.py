"""Rows of JSONL files, with their line numbers for error messages."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cache2cache.errors import DataError
from cache2cache.evaluate.questions import numbered_lines


def rows_of(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Line number, counted from 1, and row, for each line that is not empty.

    Raises:
        DataError: no such file, or a line that is not a JSON object.
        MissingExtraError: a .zst file, and zstandard is not installed.
    """
    for number, line in numbered_lines(path):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is not JSON", got=error) from error
        if not isinstance(row, dict):
            raise DataError(f"{path}, line {number} is not a JSON object", got=type(row).__name__)
        yield number, row
