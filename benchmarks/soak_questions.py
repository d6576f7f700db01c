"""What the soak asks, and what must come back: answers that the pair gave alone, in one process, before anything was served."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Literal

import torch

from cache2cache import C2C
from cache2cache.decoding import end_tokens
from cache2cache.evaluate.questions import read_questions
from cache2cache.testing import WORDS, random_fuser, tiny_model, tiny_pair
from cache2cache.types import Conversation, Message

MARGIN = 1e-3
"""Logits by which each token of an answer must be ahead of every other: what is closer may be decided by rounding, and
rounding depends on who else is in the batch."""

LONGEST = 24
"""Tokens of an answer."""

Name = Literal["tiny", "demo"]


@dataclass(frozen=True)
class Pair:
    """What `c2c serve` and `c2c share` are started with."""

    receiver: str
    sharer: str
    fuser: str

    @classmethod
    def make(cls, name: Name, folder: Path) -> Pair:
        """The demo pair, or a random one that is written into a folder."""
        if name == "demo":
            return cls("smollm2-135m", "qwen2.5-coder-1.5b", "demo")
        # vLLM has no attention for heads that are smaller.
        receiver, sharer = tiny_model("qwen3", name="tiny-receiver", head_dim=32), tiny_pair()[1]
        for lm in (receiver, sharer):
            lm.model.save_pretrained(folder / lm.card.id)
            lm.tokenizer.save_pretrained(folder / lm.card.id)
        random_fuser(receiver, sharer).save_pretrained(folder / "fuser")
        return cls(*(str(folder / part) for part in (receiver.card.id, sharer.card.id, "fuser")))


@dataclass(frozen=True)
class Answer:
    """A greedy answer."""

    text: str
    tokens: int
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Question:
    """A request, and its answers."""

    messages: Conversation
    limit: int
    """Most tokens of the answer."""
    heard: Answer
    """The pair's."""
    alone: Answer
    """The receiver's, when nobody speaks."""


def make_questions(pair: Pair, name: Name, number: int, seed: int) -> list[Question]:
    """Questions whose answers are certain, and differ with and without the sharer."""
    dice, loaded = random.Random(seed), C2C.from_pretrained(pair.receiver, [pair.sharer], [pair.fuser], dtype="float32")
    questions: list[Question] = []
    conversations = _bundled(dice) if name == "demo" else _random(dice)
    while len(questions) < number:
        messages, limit = next(conversations), dice.randint(2, LONGEST)
        heard, alone = (_answer(loaded, messages, limit, sharers) for sharers in ([0], []))
        if heard is not None and alone is not None and heard.text != alone.text:
            questions.append(Question(messages, limit, heard, alone))
    return questions


def _answer(pair: C2C, messages: Conversation, limit: int, sharers: Sequence[int]) -> Answer | None:
    """None if two tokens were almost equally likely somewhere."""
    options = {"output_logits": True, "return_dict_in_generate": True}
    answer = pair.generate(messages, sharers=sharers, max_new_tokens=limit, do_sample=False, **options)
    assert not isinstance(answer, list)
    first, second = torch.cat(answer.raw.logits).topk(2).values.T
    if (first - second).min() < MARGIN:
        return None
    finish = "stop" if answer.ids[-1] in end_tokens(pair.receiver) else "length"
    return Answer(answer.text, len(answer.ids), finish)


def _random(dice: random.Random) -> Iterator[Conversation]:
    def words(most: int) -> str:
        return " ".join(dice.choice(WORDS) for _ in range(dice.randint(1, most)))

    while True:
        opening = [Message(role="system", content=words(4))] if dice.random() < 0.3 else []
        earlier = (
            [Message(role=role, content=words(6)) for role in ("user", "assistant")] if dice.random() < 0.3 else []
        )
        yield [*opening, *earlier, Message(role="user", content=words(30))]


def _bundled(dice: random.Random) -> Iterator[Conversation]:
    rows = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))
    for number in count(1):
        row = dice.choice(rows)
        text = row.messages()[0]["content"] if dice.random() < 0.5 else row.question
        yield [Message(role="user", content=f"{number}. {text}")]
