"""What a training row may look like: multiple choice, a question with a short answer, or a chat. From a row to examples."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from cache2cache.errors import ConversationError, DataError
from cache2cache.evaluate.tasks.own import OwnChoice, OwnShortAnswer
from cache2cache.text.chat import check
from cache2cache.train.batch import Example
from cache2cache.types import Message

Turns = Literal["last", "every"]

_ABOUT = ("training", "Training rows", "your own data")
_CHOICE, _SHORT = OwnChoice(*_ABOUT, sources={}), OwnShortAnswer(*_ABOUT, sources={})


def examples_of(row: Mapping[str, Any], place: str, turns: Turns) -> list[Example]:
    """The examples in a row: one, or one for each answer of a chat.

    Questions are asked as `c2c eval` asks them of a user's file. Of several right answers the first is learned.

    Args:
        place: as in `Example`; with every turn it also gets the number of the message.
        turns: whether a chat's last answer is trained on, or every one.

    Raises:
        DataError, ConversationError: the row has another form.
    """
    if row.get("messages") is not None:
        return _chat(row["messages"], place, turns)
    if row.get("question") is None:
        allowed = "question + choices + answer, question + answer, or messages"
        raise DataError("a row of no known form", got=", ".join(row) or "an empty row", allowed=allowed)
    if row.get("choices") is not None:
        if (verdict := row.get("error_type")) not in (None, "ok"):
            raise DataError(
                "a question that is marked as wrong", got=f"error_type {verdict!r}", allowed="ok",
                hint="Leave such rows out; the task mmlu_redux does",
            )  # fmt: skip
        form, keys = _CHOICE, ("question", "choices", "answer")
    else:
        form, keys = _SHORT, ("question", "context", "answer", "answers")
        if isinstance(row.get("answer"), int):  # of a row whose choices have another name it would be learned as text
            raise DataError(
                "a number as the answer of a row without choices", got=row["answer"], allowed="text, or choices beside it",
                hint="Write the number as text, or name the options choices",
            )  # fmt: skip
    item = form.item({"id": place} | {key: row[key] for key in keys if row.get(key) is not None})
    return [Example(list(item.messages), item.target, item.topic, place)]


def _chat(messages: Any, place: str, turns: Turns) -> list[Example]:
    check(messages)
    said = [Message(role=message["role"], content=message["content"]) for message in messages]
    if said[-1]["role"] != "assistant":
        raise ConversationError("a chat does not end with an answer", got=said[-1]["role"], allowed="assistant")
    answers = [at for at, message in enumerate(said) if message["role"] == "assistant"]
    examples = []
    for at in answers if turns == "every" else answers[-1:]:
        if at == 0 or said[at - 1]["role"] != "user":
            before = said[at - 1]["role"] if at else "nothing"
            raise ConversationError(f"message {at}, an answer, does not follow a question", got=before, allowed="user")
        if not said[at]["content"].strip():
            raise ConversationError(f"message {at}, an answer, is empty")
        where = f"{place}, message {at}" if turns == "every" else place
        examples.append(Example(said[:at], said[at]["content"], said[at - 1]["content"], where))
    return examples
