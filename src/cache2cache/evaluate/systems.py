"""The ways of answering that are compared: receiver alone, sharer alone, text-to-text, C2C."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from cache2cache.pipeline import C2C
from cache2cache.types import Conversation, Generation, Message

SHARER_PROMPT = (
    "In one clear sentence, describe the most essential background knowledge needed to answer the question: {question} "
    "Do NOT directly solve or give answer to the question."
)
"""What the sharer is asked in text-to-text. Source: arXiv 2510.03215, A.3.6."""


@dataclass(frozen=True)
class Answer:
    """One system's answer to one conversation."""

    generation: Generation
    seconds: float
    """For the whole batch that it was part of, from messages to text."""
    message: str | None = None
    """What the sharer wrote to the receiver, in text-to-text."""
    message_ids: tuple[int, ...] = ()
    """Its tokens."""


System = Callable[[Sequence[Conversation]], list[Answer]]


def last_content(conversation: Conversation) -> str:
    return conversation[-1]["content"]


def systems(
    pair: C2C,
    *,
    message_tokens: int = 64,
    topic: Callable[[Conversation], str] = last_content,
    **generate_kwargs: Any,
) -> dict[str, System]:
    """The four systems of a pair with one sharer.

    Args:
        message_tokens: most tokens of a text-to-text message.
        topic: what the sharer is asked to write about; in the paper's protocol the question without its options.
        generate_kwargs: for the answers; decoding is greedy unless they say otherwise.
    """
    (sharer,), (fuser,) = pair.sharers, pair.fusers
    options = {"do_sample": False, **generate_kwargs}
    # The sharer answers from the prompt that it shares its cache from, and writes messages as the chat model that it is.
    answering, writing = C2C(sharer, template=fuser.config.sharer_template), C2C(sharer)

    def text_to_text(conversations: Sequence[Conversation]) -> list[Answer]:
        start = time.perf_counter()
        asked = [with_last(c, SHARER_PROMPT.format(question=topic(c))) for c in conversations]
        messages = _many(writing, asked, do_sample=False, max_new_tokens=message_tokens)
        told = [
            with_last(c, f"{message.text.strip()}\n\n{c[-1]['content']}")
            for c, message in zip(conversations, messages, strict=True)
        ]
        answers = _many(pair, told, sharers=[], **options)
        seconds = time.perf_counter() - start
        return [Answer(a, seconds, m.text, tuple(m.ids)) for a, m in zip(answers, messages, strict=True)]

    return {
        "receiver": lambda conversations: _timed(pair, conversations, sharers=[], **options),
        "sharer": lambda conversations: _timed(answering, conversations, **options),
        "text-to-text": text_to_text,
        "c2c": lambda conversations: _timed(pair, conversations, **options),
    }


def with_last(conversation: Conversation, content: str) -> list[Message]:
    """The conversation with another last message."""
    return [*conversation[:-1], Message(role=conversation[-1]["role"], content=content)]


def extract_letter(text: str, letters: str) -> str | None:
    """The letter that an answer names, None if it names none. Never guesses from prose.

    Accepts a letter alone at the start, or after "Answer:", "The answer is", "The correct answer is"; in brackets or
    asterisks, followed by nothing or punctuation.
    """
    lead = r"(?:(?:the\s+)?(?:correct\s+)?(?:answer|option)(?:\s+is)?\s*:?\s*)?"
    match = re.match(rf"\s*(?i:{lead})[(*\[\s]*([{letters}])(?=\s*$|[).:,*\]\n])", text)
    return match[1] if match else None


def _timed(pair: C2C, conversations: Sequence[Conversation], **options: Any) -> list[Answer]:
    start = time.perf_counter()
    answers = _many(pair, conversations, **options)
    seconds = time.perf_counter() - start
    return [Answer(answer, seconds) for answer in answers]


def _many(pair: C2C, conversations: Sequence[Conversation], **options: Any) -> list[Generation]:
    answers = pair.generate(list(conversations), **options)
    assert isinstance(answers, list), "a batch is answered with a list"
    return answers
