"""The systems that are compared, the controls among them. All answer greedily and differ only in what they read."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from cache2cache.crossing import crossing_bytes
from cache2cache.evaluate import scoring
from cache2cache.evaluate.forms import Form, kind_of
from cache2cache.evaluate.heard import Listen
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.writing import write
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.types import Conversation, Message, Timings, clock

MESSAGE_PROMPT = (
    "In one clear sentence, describe the most essential background knowledge needed to answer the question: {topic} "
    "Do NOT directly solve or give answer to the question."
)
"""What the sharer is asked in text-to-text. Source: arXiv 2510.03215, A.3.6."""

FAIR_PROMPT = (
    "{content}\n\nSomebody who knows less than you must answer this. Write them a note of at most three sentences: the "
    "facts that matter, and which answer is right."
)
"""The same for a sharer that sees everything and may answer."""

Forms = Mapping[str, Form]
"""How a model is asked when it answers alone: a form for "choice" and one for "text"."""


class Alone:
    """A model that answers by itself, asked in the form that serves it best.

    Args:
        unit: the receiver of the comparison, in whose tokens targets are counted.
        sharer: whether this is a sharer, whose prefills the fused systems may share.
    """

    def __init__(
        self, name: str, lm: LanguageModel, forms: Forms, prefills: Prefills, unit: LanguageModel, *, sharer: bool
    ):
        self.name, self.forms = name, forms
        self._pairs = {kind: C2C(lm, template=form.template) for kind, form in forms.items()}
        self._prefills, self._unit, self._sharer = prefills, unit.tokenizer, sharer

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """See `System`."""
        kind = kind_of(items[0])
        return self.told(items, [item.wordings[self.forms[kind].wording] for item in items])

    def told(self, items: Sequence[Item], conversations: Sequence[Conversation]) -> list[Answer]:
        """Answer items that are put in other words than their own."""
        start, timings = time.perf_counter(), Timings()
        pair = self._pairs[kind_of(items[0])]
        rows = pair.rows(conversations, timings=timings)
        prefill = self._prefills.alone(pair, rows, timings, whole=self._sharer)
        found = scoring.answers(pair, prefill, items, self._unit)
        if self._sharer:
            found = [_as_sharer(answer) for answer in found]
        seconds = time.perf_counter() - start
        return [replace(answer, seconds=seconds) for answer in found]


def _as_sharer(answer: Answer) -> Answer:
    cost = answer.cost
    return replace(
        answer,
        cost=replace(
            cost,
            receiver_read=0, receiver_wrote=0, sharer_read=cost.receiver_read, sharer_wrote=cost.receiver_wrote,
        ),
    )  # fmt: skip


class Fused:
    """C2C: the receiver answers from a cache into which other caches are fused.

    Args:
        listen: what is heard as the sharers' caches: their own, or what a control puts in their place.
        speaking: indices of the sharers that speak; all by default.
    """

    def __init__(self, name: str, pair: C2C, prefills: Prefills, listen: Listen, speaking: Sequence[int] | None = None):
        self.name = name
        self._pair, self._prefills, self._listen, self._speaking = pair, prefills, listen, speaking

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """See `System`."""
        start, timings = time.perf_counter(), Timings()
        rows = self._pair.rows([item.messages for item in items], self._speaking, timings)
        rows, heard = self._listen(items, rows)
        prefill = self._prefills.fused(self._pair, rows, heard, timings)
        found = scoring.answers(self._pair, prefill, items, self._pair.receiver.tokenizer)
        crossed = [crossing_bytes(self._pair, row) for row in rows]
        seconds = time.perf_counter() - start
        return [
            replace(answer, cost=replace(answer.cost, cache_bytes=size), seconds=seconds)
            for answer, size in zip(found, crossed, strict=True)
        ]


class TextToText:
    """The sharers write to the receiver, which then reads what they wrote before the question.

    Args:
        receiver: how the receiver answers alone.
        ask: the request that an item becomes for the sharers.
        message_tokens: most tokens of a message.
    """

    def __init__(
        self,
        name: str,
        receiver: Alone,
        sharers: Sequence[LanguageModel],
        ask: Callable[[Item], Conversation],
        message_tokens: int,
    ):
        self.name = name
        self._receiver, self._ask, self._message_tokens = receiver, ask, message_tokens
        self._writers = [C2C(lm) for lm in sharers]

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """See `System`."""
        start, timings = time.perf_counter(), MessageTimings()
        asked = [self._ask(item) for item in items]
        read, wrote = [0] * len(items), [0] * len(items)
        messages: list[list[str]] = [[] for _ in items]
        for writer in self._writers:
            with clock(timings, "message"):
                written, prompts = write(writer, asked, self._message_tokens)
            for row, ids in enumerate(written):
                read[row] += prompts[row]
                wrote[row] += len(ids)
                messages[row].append(str(writer.receiver.tokenizer.decode(ids, skip_special_tokens=True)).strip())
        notes = ["\n\n".join(parts) for parts in messages]
        wording = self._receiver.forms[kind_of(items[0])].wording
        told = [_after(note, item.wordings[wording]) for note, item in zip(notes, items, strict=True)]
        found = self._receiver.told(items, told)
        vars(timings).update({stage: seconds for stage, seconds in vars(found[0].timings).items() if seconds})
        seconds = time.perf_counter() - start
        return [
            replace(
                answer,
                message=note,
                cost=replace(answer.cost, sharer_read=r, sharer_wrote=w, text_bytes=len(note.encode())),
                timings=timings,
                seconds=seconds,
            )
            for answer, note, r, w in zip(found, notes, read, wrote, strict=True)
        ]


class MessageTimings(Timings):
    """Stages of text-to-text: writing the messages comes first."""

    def __init__(self) -> None:
        super().__init__()
        self.message = 0.0


def ask_background(item: Item) -> Conversation:
    """The paper's protocol: background on the question, without the options, without an answer."""
    return [Message(role="user", content=MESSAGE_PROMPT.format(topic=item.topic))]


def ask_all(item: Item) -> Conversation:
    """The fair variant: the sharer sees what the receiver sees, and may answer."""
    return with_last(item.messages, FAIR_PROMPT.format(content=item.messages[-1]["content"]))


def _after(note: str, conversation: Conversation) -> Conversation:
    return with_last(conversation, f"{note}\n\n{conversation[-1]['content']}")


def with_last(conversation: Conversation, content: str) -> list[Message]:
    """The conversation with another last message."""
    return [*conversation[:-1], Message(role=conversation[-1]["role"], content=content)]
