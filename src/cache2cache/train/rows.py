"""From examples to tokens: rendering, aligning, and shortening prompts so that the response is kept whole."""

from __future__ import annotations

import bisect
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch

from cache2cache.errors import C2CError, ContextLengthError, ModelError
from cache2cache.evaluate.scoring import target_ids
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.train.batch import Example, TrainRow
from cache2cache.train.contamination import Dropped
from cache2cache.train.everywhere import everywhere
from cache2cache.types import Message

# What a prompt loses at a time. Text without spaces, such as Chinese, is cut into pieces.
_WORD = re.compile(r"\S{1,32}")

_SHORTEN = "Set data.max_tokens to shorten long prompts"


def train_rows(
    examples: Iterable[Example],
    pair: C2C,
    *,
    max_tokens: int | None = None,
    response_tokens: int | None = None,
    fused: Literal["prompt", "everywhere"] = "prompt",
) -> tuple[list[TrainRow], list[Dropped]]:
    """Examples as both models read them, and those that cannot be trained on.

    Args:
        max_tokens: longest prompt and response together, on either side. While a row is longer than this, or than a model's
            context, its longest message loses its first word; templates stay whole, and every message keeps a word.
            A row that does not fit even so is dropped. None shortens nothing.
        response_tokens: of a response, only the first so many are learned, and count.
        fused: see `config.ObjectivePart`.

    Raises:
        ContextLengthError: without `max_tokens`, a row that is longer than a model's context.
        ConversationError, TemplateError, AlignmentError: a row that a model cannot read. All name the row.
        ModelError: the receiver has no token that ends its turn.
    """
    rows, dropped = [], []
    for example in examples:
        try:
            row = _fitted(example, _Form(pair, max_tokens, response_tokens, fused == "everywhere"))
        except C2CError as error:
            hint = _SHORTEN if isinstance(error, ContextLengthError) else error.hint
            raise type(error)(
                f"{example.place}: {error.what}", got=error.got, allowed=error.allowed, hint=hint
            ) from error
        if row is None:
            dropped.append(Dropped(example.place, "too long"))
        elif not (row.response >= 0).any():  # fused everywhere, and both models are nowhere at the same character
            dropped.append(Dropped(example.place, "no token to learn"))
        else:
            rows.append(replace(row, place=example.place, alone=example.alone))
    return rows, dropped


@dataclass(frozen=True)
class _Form:
    """What rows are made to be."""

    pair: C2C
    max_tokens: int | None
    response_tokens: int | None
    everywhere: bool

    def row(self, messages: Sequence[Message], response: str) -> TrainRow:
        """Raise ContextLengthError if it is too long."""
        row = _row(messages, response, self.pair, self.response_tokens)
        self._check(_lengths(row, self.pair, self.response_tokens))
        if self.everywhere:  # the sharer reads as far as the receiver's tokens reach, which may be further
            row = everywhere(row, self.pair)
            self._check((len(row.row.ids) + 1, len(row.row.sharers[0].ids)))  # type: ignore[union-attr]
        return row

    def _check(self, lengths: tuple[int, int]) -> None:
        for lm, length in zip((self.pair.receiver, *self.pair.sharers), lengths, strict=True):
            longest = [x for x in (lm.card.geometry.max_positions, self.max_tokens) if x is not None]
            if longest and length > min(longest):
                raise ContextLengthError(
                    f"prompt and response do not fit into the context of {lm.card.id}",
                    got=f"{length} tokens",
                    allowed=min(longest),
                )


def _fitted(example: Example, form: _Form) -> TrainRow | None:
    if form.max_tokens is None:
        return form.row(example.messages, example.response)

    def fitting(words: int) -> TrainRow | None:
        try:
            return form.row(shortened(example.messages, words), example.response)
        except ContextLengthError:
            return None

    most = sum(len(_WORD.findall(message["content"])) for message in example.messages)
    least = sum(bool(message["content"].strip()) for message in example.messages)
    if whole := fitting(most):
        return whole
    best = fitting(least)
    while best and most - least > 1:  # `least` words fit, `most` do not
        middle = (least + most) // 2
        if longer := fitting(middle):
            best, least = longer, middle
        else:
            most = middle
    return best


def shortened(messages: Sequence[Message], words: int) -> list[Message]:
    """The messages with so many words in all: while there are more, the longest message loses its first one.

    Of messages of one length the earliest loses first.
    """
    starts = [[word.start() for word in _WORD.finditer(message["content"])] for message in messages]
    counts = [len(found) for found in starts]
    # Each message keeps at most `level` words, and the last of those that have more keep one more until the sum is right.
    level = bisect.bisect_right(range(max(counts) + 1), words, key=lambda n: sum(min(n, c) for c in counts)) - 1
    kept = [min(level, count) for count in counts]
    more = [at for at, count in enumerate(counts) if count > level]
    for at in more[len(more) - (words - sum(kept)) :]:
        kept[at] += 1
    return [
        message
        if keep == len(found)
        else Message(role=message["role"], content=message["content"][found[-keep] :] if keep else "")
        for message, found, keep in zip(messages, starts, kept, strict=True)
    ]


def _row(messages: Sequence[Message], response: str, pair: C2C, response_tokens: int | None) -> TrainRow:
    (row,) = pair.rows([messages])
    end = pair.receiver.tokenizer.eos_token_id
    if end is None:
        raise ModelError(f"{pair.receiver.card.id} has no token that ends its turn", hint="Set tokenizer.eos_token")
    ids = _answer(pair.receiver, row.ids, response)
    return TrainRow(row, np.array([*ids, end], dtype=np.int64)[:response_tokens], response)


def _answer(lm: LanguageModel, prompt: np.ndarray, response: str) -> list[int]:
    return target_ids(lm, torch.as_tensor(prompt[-1:]), response)


def _lengths(row: TrainRow, pair: C2C, response_tokens: int | None) -> tuple[int, int]:
    """Tokens of prompt and what is learned of the response with the end of the turn, of receiver and sharer."""
    (sharer,), (part,) = pair.sharers, row.row.sharers
    assert part is not None, "every training row has a sharer"
    theirs = [*_answer(sharer, part.ids, row.text), None][:response_tokens]
    return len(row.row.ids) + len(row.response), len(part.ids) + len(theirs)
