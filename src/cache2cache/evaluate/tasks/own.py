"""A task made of a user's own JSONL file, without writing code. The first row tells which of three forms the file has.

- multiple choice: `question`, `choices`, and `answer`: the 0-based index of a choice as a number, or its letter or text
- short answers: `question`, `answer` or a list of `answers`, and if wanted the passage as `context`
- chats: `messages`, ending with the reference response

`id` and `subject` may be given in every form. Rows without an id are numbered by their line.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StrictInt, StrictStr

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.questions import LETTERS, Question
from cache2cache.evaluate.tasks.base import File, Row, Task, checked
from cache2cache.evaluate.tasks.chats import ChatTask
from cache2cache.evaluate.tasks.choice import ChoiceTask, choice_item
from cache2cache.evaluate.tasks.files import rows_of
from cache2cache.evaluate.tasks.text import ShortAnswerRow, ShortAnswerTask, Text, short_answer_item

ENDINGS = (".jsonl", ".jsonl.zst")

_FORMS = "question + choices + answer, question + answer, or messages"


class _OwnRow(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")

    id: StrictStr | StrictInt
    subject: Text | None = None


class OwnChoiceRow(_OwnRow):
    """A multiple-choice row as a user may write it."""

    question: Text
    choices: Annotated[tuple[Text, ...], Field(min_length=2, max_length=len(LETTERS))]
    answer: StrictInt | StrictStr


class OwnShortAnswerRow(_OwnRow):
    """A short-answer row as a user may write it."""

    question: Text
    context: Text | None = None
    answer: StrictStr | StrictInt | None = None
    answers: Annotated[list[Text], Field(min_length=1)] | None = None


class OwnChatRow(_OwnRow):
    """A chat as a user may write it; its messages are checked by `ChatTask`."""


@dataclass(frozen=True)
class OwnChoice(ChoiceTask):
    """A user's multiple-choice questions."""

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        own = checked(OwnChoiceRow, row, "multiple-choice")
        question = Question(
            id=str(own.id),
            subject=own.subject or self.name,
            question=own.question,
            choices=own.choices,
            answer=index_of(own.answer, own.choices),
        )
        return choice_item(self.name, question)


@dataclass(frozen=True)
class OwnShortAnswer(ShortAnswerTask):
    """A user's questions with short answers."""

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        own = checked(OwnShortAnswerRow, row, "short-answer")
        if (own.answer is None) == (own.answers is None):
            raise DataError(
                "a short-answer row needs either answer or answers", got=", ".join(key for key in row if key != "id")
            )
        answers = [str(own.answer)] if own.answers is None else own.answers
        full = {
            "id": str(own.id), "title": own.subject or self.name, "context": own.context, "question": own.question,
            "answers": answers,
        }  # fmt: skip
        return short_answer_item(self.name, checked(ShortAnswerRow, full, "short-answer"))


@dataclass(frozen=True)
class OwnChats(ChatTask):
    """A user's conversations."""

    def item(self, row: Row) -> Item:
        """See `Task.item`."""
        own = checked(OwnChatRow, row, "chat")
        return super().item({**row, "id": str(own.id), "category": own.subject})


def own_task(path: Path) -> Task:
    """The task of a user's file, named after it.

    Raises:
        DataError: no such file, no rows, or rows of no known form.
    """
    _, first = next(iter(rows_of(path)), (0, None))
    if first is None:
        raise DataError("a data file has no rows", got=path)
    if first.get("messages") is not None:
        kind = OwnChats
    elif first.get("choices") is not None:
        kind = OwnChoice
    elif first.get("question") is not None:
        kind = OwnShortAnswer
    else:
        raise DataError(f"{path} has rows of no known form", got=", ".join(first) or "an empty row", allowed=_FORMS)
    name = re.sub(r"\.jsonl(\.zst)?$", "", path.name)
    return kind(name=name, title=name, licence="your own data", sources={"test": File(path)})


def index_of(answer: int | str, choices: Sequence[str]) -> int:
    """Which choice an answer means: a number is a 0-based index, a string a letter or the text of a choice.

    Raises:
        DataError: none of them, or it could mean more than one.
    """
    if isinstance(answer, int):
        meant = {answer}
    else:
        meant = {at for at, choice in enumerate(choices) if choice.strip() == answer.strip()}
        meant |= {at for at, letter in enumerate(LETTERS) if letter == answer.strip()}
    meant &= set(range(len(choices)))
    if len(meant) == 1:
        return meant.pop()
    letters = LETTERS[: len(choices)]
    raise DataError(
        "an answer could mean several choices" if meant else "an answer is none of the choices",
        got=repr(answer),
        allowed=f"an index 0–{len(choices) - 1}, one of {'/'.join(letters)}, or the exact text of one choice",
        hint=f"It could be {' or '.join(letters[at] for at in sorted(meant))}" if meant else None,
    )
