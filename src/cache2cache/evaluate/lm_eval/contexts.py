"""From the harness's contexts to what a pair reads: prompts are C2C's own, tokens those of the harness's model `hf`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cache2cache import plaintext
from cache2cache.errors import AlignmentError, ConversationError
from cache2cache.inputs import Row, SharerRow
from cache2cache.pipeline import C2C
from cache2cache.text import chat
from cache2cache.types import Conversation

_KEY = "c2c_conversation"


class Asked(NamedTuple):
    """A conversation that is to be answered."""

    messages: Conversation
    begun: bool
    """Whether the last message is the beginning of the answer."""


def pack(asked: Asked) -> str:
    """A context that carries a conversation.

    Raises:
        ConversationError: see `text.chat.check`.
    """
    chat.check(asked.messages)
    return json.dumps({_KEY: asked.messages, "begun": asked.begun}, ensure_ascii=False)


def unpack(context: str) -> Asked | None:
    """The conversation in a context; None for plain text.

    Raises:
        ConversationError: a task has written around it.
    """
    if not context.startswith(f'{{"{_KEY}": '):
        return None
    try:
        return Asked(*json.loads(context).values())
    except ValueError as error:
        raise ConversationError(
            "the task writes around the conversation, which only works with plain text",
            got=repr(context),
            hint="Run it without --apply_chat_template",
        ) from error


@dataclass(frozen=True)
class Prompt:
    """What a pair reads of a context."""

    row: Row
    before: int
    """Special tokens that hf puts before the receiver's."""
    same_ids: tuple[bool, ...]
    """For each sharer whether it reads the receiver's token ids."""

    def covers(self, ids: Sequence[int]) -> int:
        """How many tokens, of those that hf reads, are the prompt's."""
        return self.before + _common(self.row.ids, ids[self.before :])

    def fitted(self, ids: Sequence[int]) -> Row:
        """The row with hf's tokens. Those before the prompt and behind it are read, and not fused.

        Where hf's tokens run on from the prompt's last character, the prompt's last token is another one among them,
        and the prompt ends before it.

        Raises:
            AlignmentError: hf would read something else.
        """
        start, stop, size = self.before, self.covers(ids), len(ids)
        if self.row.sharers and stop < min(start + len(self.row.ids), size) - 1:
            raise AlignmentError(
                "hf would not read the prompt that the pair reads",
                got=f"{stop - start} tokens in common",
                allowed=f"{min(len(self.row.ids), size - start)}, or all but the last",
                hint="The receiver's chat template writes the beginning of an answer in another way than a prompt",
            )
        sharers: list[SharerRow | None] = []
        for part, same in zip(self.row.sharers, self.same_ids, strict=True):
            assert part is not None, "every sharer speaks"
            alignment, due = np.zeros((2, size), dtype=np.int64)
            alignment[start:stop] = part.alignment[: stop - start]
            due[start:stop] = np.where(part.due > 0, np.minimum(part.due + start, stop - 1), 0)[: stop - start]
            due[stop - 1 :] = 0
            sharers.append(
                SharerRow(np.array(ids), np.arange(size), due) if same else SharerRow(part.ids, alignment, due)
            )
        return Row(np.array(ids), tuple(sharers))


class Reader:
    """Reads contexts as a pair does."""

    def __init__(self, pair: C2C):
        self.pair = pair
        self.tokenizer = pair.receiver.tokenizer

    @property
    def prefix_token(self) -> int:
        """What hf reads in place of an empty context, and takes a text to begin with."""
        bos, eos = self.tokenizer.bos_token_id, self.tokenizer.eos_token_id
        return eos if bos is None else bos  # type: ignore[return-value]

    def tokens(self, text: str, special: bool | None = None) -> list[int]:
        """The receiver's ids.

        Args:
            special: whether special tokens are added; by default, unless the text begins with them already.
        """
        if special is None:
            special = not text.startswith(str(self.tokenizer.decode(self.prefix_token)))
        return self.tokenizer.encode(text, add_special_tokens=special)

    def text(self, context: str) -> str:
        """What hf would be given."""
        asked = unpack(context)
        if asked is None:
            return context
        rendering = chat.render(
            self.tokenizer,
            asked.messages,
            template=self.pair.template,
            add_generation_prompt=not asked.begun,
            outer_space=True,
        )
        return rendering.text[: rendering.ranges[-1][1]] if asked.begun else rendering.text

    def prompt(self, context: str, *, strip: bool = False) -> Prompt:
        """What all models read.

        Args:
            strip: leave out white space at the end of a plain text.

        Raises:
            ConversationError, TemplateError, AlignmentError, ContextLengthError: see `inputs.row`.
        """
        asked = unpack(context)
        if asked is None:
            text = context.rstrip() if strip else context
            row = self._read_text(text)
        else:
            text = self.text(context)
            (row,) = self.pair.rows([asked.messages[:-1] if asked.begun else asked.messages])
        before = len(self.tokens(text)) - len(self.tokens(text, special=False))
        return Prompt(row, before, tuple(fuser.config.alignment == "same-ids" for fuser in self.pair.fusers))

    def _read_text(self, text: str) -> Row:
        # The receiver's special tokens are left to hf's rule.
        return plaintext.row(self.pair, text, range(len(self.pair.sharers)), begin=False)


def _common(a: Iterable[int], b: Iterable[int]) -> int:
    """Length of the common prefix."""
    count = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        count += 1
    return count
