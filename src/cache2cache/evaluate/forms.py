"""Prompt forms: the ways in which a model is asked when it answers alone, and the choice among them.

A comparison with a badly asked baseline says nothing, so receiver and sharer each get the form that serves them best on
training rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item
from cache2cache.text.chat import BOS

_CONTENTS = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '\nAnswer: ' }}{% elif not loop.first %}{{ '\n\n' }}{% endif %}"
    "{{ message['content'] }}{% endfor %}"
)
_ANSWER = "{% if add_generation_prompt %}{{ '\nAnswer:' }}{% endif %}"


@dataclass(frozen=True)
class Form:
    """One way of asking."""

    name: str
    template: str | None
    """How messages become a prompt: None is the model's own chat template, otherwise Jinja text."""
    wording: str
    """Which of an item's wordings is asked."""


FORMS: Mapping[str, Form] = MappingProxyType(
    {
        form.name: form
        for form in (
            Form("chat", None, "plain"),
            Form("chat-paper", None, "paper"),
            Form(
                "quiz",
                BOS + "The following are multiple choice questions (with answers).\n\n" + _CONTENTS + _ANSWER,
                "plain",
            ),
            Form("completion", BOS + _CONTENTS + _ANSWER, "bare"),
        )
    }
)
"""All forms. chat: the chat template with a short instruction; chat-paper: with the paper's instruction; quiz: a heading,
the question with the instruction, "Answer:" and no chat template, for multiple choice only; completion: the bare question,
"Answer:" and no chat template."""

DEFAULT = "chat"
"""Asked where there are no training rows to choose on."""


def kind_of(item: Item) -> str:
    """What a form is chosen for: "choice" or "text"."""
    return "choice" if item.letters else "text"


def candidates(items: Sequence[Item]) -> list[Form]:
    """The forms that all of these items can be asked in; items of one kind."""
    return [
        form
        for form in FORMS.values()
        if all(form.wording in item.wordings for item in items) and (form.name != "quiz" or items[0].letters)
    ]


def named(name: str) -> Form:
    """A form by its name.

    Raises:
        DataError: there is no such form.
    """
    if name not in FORMS:
        raise DataError("unknown prompt form", got=name, allowed=", ".join(FORMS))
    return FORMS[name]
