"""Training rows that give an evaluation away: those that ask the same, or share a run of 13 words with a question."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cache2cache.errors import ConversationError, DataError
from cache2cache.evaluate import tasks
from cache2cache.text.chat import check
from cache2cache.train.batch import Example
from cache2cache.train.config import Machine, Source
from cache2cache.train.sources import ENDINGS, raw_rows

_RUN = 13

_UNSPACED = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
"""Kana and Han characters, which are written without spaces: each counts as a word."""
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W{_UNSPACED}]+")


@dataclass(frozen=True)
class HeldOut:
    """A question that training must not have seen."""

    text: str
    place: str
    """Where it lies, as in `Example`."""


@dataclass(frozen=True)
class Dropped:
    """A row that is not trained on."""

    place: str
    """Where it lies, as in `Example`."""
    reason: Literal["same question", "13 words in a row", "too long", "no token to learn"]
    held_out: str | None = None
    """Where the question lies that it would give away."""


class Contamination:
    """Keeps training rows away from evaluation questions, and remembers those that it kept out.

    Case, punctuation and white space do not matter; a Chinese or Japanese character counts as a word. A row asks the same as a
    question if the whole of what it asks in any turn, or one line of it, is the question: chats often wrap a question in
    instructions and options. What is compared is what people ask: user turns, without the passage of a short answer, and neither
    system messages nor answers.

    Args:
        held_out: neither these nor a run of 13 words of one may be asked.
        validation: rows that choose the best weights. Only the same question counts: rows of one chat set often share
            their instructions.
    """

    def __init__(self, held_out: Iterable[HeldOut], validation: Iterable[Example] = ()):
        self._dropped: dict[str, Dropped] = {}
        self._questions: dict[str, str] = {}
        self._runs: dict[str, str] = {}
        for question in held_out:
            words = _words(question.text)
            self._questions.setdefault(" ".join(words), question.place)
            for run in _runs(words):
                self._runs.setdefault(run, question.place)
        for row in validation:
            self._questions.setdefault(" ".join(_words(row.asked)), row.place)
        self._questions.pop("", None)  # a chat may ask nothing, and every blank line would ask the same

    @property
    def dropped(self) -> list[Dropped]:
        """The rows that were kept out, each once."""
        return list(self._dropped.values())

    def find(self, row: Example) -> Dropped | None:
        """Why a row must not be trained on; None if it may be."""
        # Earlier turns give away as much: their answers stand in the prompt.
        asked = [row.asked, *(m["content"] for m in row.messages[:-1] if m["role"] == "user")]
        for text in (x for whole in asked for x in (whole, *whole.splitlines())):
            if place := self._questions.get(" ".join(_words(text))):
                return Dropped(row.place, "same question", place)
        for run in (run for text in asked for run in _runs(_words(text))):
            if place := self._runs.get(run):
                return Dropped(row.place, "13 words in a row", place)
        return None

    def keep(self, row: Example) -> bool:
        """Whether a row may be trained on; if not, it goes to `dropped`."""
        found = self.find(row)
        if found is not None:
            self._dropped[row.place] = found
        return found is None


def read_held_out(names: Sequence[str], machine: Machine) -> list[HeldOut]:
    """The questions of evaluation files, `DataPart.held_out`, and of tasks: what a task asks, its test rows.

    Of a chat it is the last question.

    Raises:
        DataError: no such file or task, or a row without a question.
        DownloadError, MissingExtraError: see `sources.read`.
    """
    found = []
    for name in names:
        if name.endswith(ENDINGS):
            rows = raw_rows(Source(path=name), machine)
            found += [HeldOut(_asked(row, place), place) for place, row in rows]
        else:
            task = tasks.get(name)
            items = tasks.load(task, data_dir=machine.data_dir).items
            found += [HeldOut(item.topic, f"{task.name}, row {item.id}") for item in items]
    return found


def write_dropped(path: Path, dropped: Iterable[Dropped]) -> None:
    """One JSON line for each dropped row: its place, the reason, and the place of the evaluation question."""
    path.write_text("".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in dropped), encoding="utf-8")


def _asked(row: Mapping[str, Any], place: str) -> str:
    question = row.get("question")
    if row.get("messages") is not None:
        try:
            check(row["messages"])
        except ConversationError as error:
            raise DataError(f"{place}: {error.what}", got=error.got, allowed=error.allowed) from error
        question = next((m["content"] for m in reversed(row["messages"]) if m["role"] == "user"), None)
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{place}: a row without a question", got=", ".join(row), allowed="question, or messages")
    return question


def _words(text: str) -> list[str]:
    """Words without case and punctuation; a text of symbols only is one word."""
    return _WORD.findall(text.lower()) or [text.strip()]


def _runs(words: Sequence[str]) -> Iterator[str]:
    return (" ".join(words[i : i + _RUN]) for i in range(len(words) - _RUN + 1))
