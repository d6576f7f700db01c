"""Multiple-choice questions: reading them and asking them."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from cache2cache.errors import DataError, MissingExtraError
from cache2cache.types import Message

LETTERS = "ABCDEFGHIJ"


class Question(BaseModel):
    """One row of a multiple-choice set. Fields that a set adds are kept aside, not refused."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    id: str
    subject: str
    question: str
    choices: tuple[str, ...]
    answer: int
    """Index into `choices`."""
    error_type: str = "ok"
    """MMLU-Redux's verdict on the row; anything but `ok` means that question or answer is wrong."""

    @property
    def letters(self) -> str:
        return LETTERS[: len(self.choices)]

    @property
    def letter(self) -> str:
        """The right one."""
        return LETTERS[self.answer]

    def messages(self) -> list[Message]:
        """The question as a conversation of one turn."""
        options = "\n".join(f"{letter}. {choice}" for letter, choice in zip(LETTERS, self.choices, strict=False))
        text = f"Question: {self.question}\n{options}\nAnswer with the letter."
        return [{"role": "user", "content": text}]


def read_questions(path: str | Path, *, limit: int | None = None, seed: int = 0) -> list[Question]:
    """Rows of a JSONL file (`.zst` too), all of them or a random sample in a fixed order.

    Rows that MMLU-Redux marks as wrong are left out, as the benchmark's authors do.

    Raises:
        DataError: no such file, or a row of another form.
    """
    rows = []
    for number, line in numbered_lines(Path(path)):
        try:
            row = Question.model_validate_json(line)
        except ValidationError as error:
            raise DataError(f"{path}, line {number} is not a multiple-choice row", got=str(error)) from error
        if not 0 <= row.answer < len(row.choices) <= len(LETTERS):
            raise DataError(
                f"{path}, line {number}: answer out of range", got=row.answer, allowed=f"0–{len(row.choices) - 1}"
            )
        rows.append(row)
    rows = [row for row in rows if row.error_type == "ok"]
    return rows if limit is None or limit >= len(rows) else random.Random(seed).sample(rows, limit)


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """Non-empty lines of a text file, plain or `.zst`, with their numbers counted from 1. Only line feeds end a line.

    Raises:
        DataError: no such file, or it is damaged or not UTF-8.
        MissingExtraError: a .zst file, and zstandard is not installed.
    """
    if not path.is_file():
        raise DataError("no such data file", got=path, allowed="a .jsonl or .jsonl.zst file")
    damaged: tuple[type[Exception], ...] = (UnicodeDecodeError,)
    with path.open("rb") as raw:
        stream: Any = raw
        if path.suffix == ".zst":
            try:
                import zstandard
            except ImportError as error:
                raise MissingExtraError(
                    "reading .zst needs zstandard", hint="pip install 'cache2cache[train]'"
                ) from error
            damaged += (zstandard.ZstdError,)
            stream = zstandard.ZstdDecompressor().stream_reader(raw, read_across_frames=True)
        try:
            for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8-sig", newline="\n"), 1):
                if line.strip():
                    yield number, line
        except damaged as error:
            raise DataError("a data file is damaged or not UTF-8", got=f"{path}: {error}") from error
