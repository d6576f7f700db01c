"""What a system is asked, and what it answers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from cache2cache.types import Conversation, Timings


@dataclass(frozen=True)
class Item:
    """One row of a task, as every system is asked it."""

    task: str
    id: str
    """Unique within the task."""
    subject: str
    wordings: Mapping[str, Conversation]
    """The question in one or more wordings, see `forms`; always "plain", which is what fused models read."""
    topic: str
    """What a text-to-text sharer is asked to write about; without the options of a multiple-choice question."""
    target: str
    """The right answer: a letter, a number, a text; for chats the reference response."""
    letters: str = ""
    """The valid letters of a multiple-choice question; empty for other tasks."""
    accepted: tuple[str, ...] = ()
    """Every answer that counts as right, where that is not just `target`."""
    max_new_tokens: int = 64
    """Most tokens of the answer; 0 asks for none, and then only the likelihood of the target is measured."""
    one_line: bool = True
    """Whether an answer ends with its first line; one with letters also ends behind a letter that it begins with."""

    @property
    def messages(self) -> Conversation:
        return self.wordings["plain"]

    @property
    def asked(self) -> str:
        """What is asked and what is right, in 16 hex digits, however long an answer may be."""
        said = [{name: list(part) for name, part in self.wordings.items()}, self.letters, self.target, self.accepted]
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Cost:
    """What one answer took."""

    receiver_read: int = 0
    """Tokens."""
    sharer_read: int = 0
    receiver_wrote: int = 0
    sharer_wrote: int = 0
    cache_bytes: int = 0
    """Bytes of sharer cache that went into the fusion: the fused positions of the mapped layers."""
    text_bytes: int = 0
    """Bytes of text from sharer to receiver, UTF-8."""


@dataclass(frozen=True)
class Answer:
    """One system's answer to one item."""

    text: str
    """Empty where the item asks for no text."""
    ended: bool = True
    """Whether the model stopped by itself, at an end token or a stop string, before `max_new_tokens`."""
    letter_logprobs: tuple[float, ...] = ()
    """Log-probability of each valid letter at the answer position, normalised over the valid letters."""
    target_nats: float | None = None
    """Negative log-likelihood of the target without an end of turn, in nats, summed; None for multiple choice."""
    target_tokens: int = 0
    """Tokens of the target as the receiver's tokenizer counts them, whoever answers, so that systems compare."""
    cost: Cost = Cost()
    message: str | None = None
    """What the sharer wrote to the receiver, in text-to-text."""
    route: str | None = None
    """Who answered, "receiver" or "sharer", in routing."""
    timings: Timings = field(default_factory=Timings)
    """Seconds of the whole batch that it was part of, by stage. Prefills that were reused count as nothing."""
    seconds: float = 0.0
    """Of the whole batch, from messages to answers."""


class System(Protocol):
    """One way of answering."""

    name: str

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """Answer a batch of items of one task, in order. Greedy and deterministic."""
        ...
