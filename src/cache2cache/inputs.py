"""From conversations to the padded tensors that the request path runs on.

Batches are padded on the left, so that every row's prompt ends in the same column.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache2cache.errors import AlignmentError, ContextLengthError
from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel, Sharer
from cache2cache.text.align import align
from cache2cache.text.chat import render
from cache2cache.text.retokenise import retokenise
from cache2cache.types import Conversation, Timings, clock


@dataclass(frozen=True)
class SharerRow:
    """What one sharer reads of one conversation."""

    ids: np.ndarray
    """(M,)"""
    alignment: np.ndarray
    """(N,) sharer position of each receiver position."""
    due: np.ndarray
    """(N,) when each receiver position is fused: once the receiver has read this many positions; 0 is never."""


@dataclass(frozen=True)
class Row:
    """One conversation as every model reads it."""

    ids: np.ndarray
    """(N,) the receiver's tokens."""
    sharers: tuple[SharerRow | None, ...]
    """One per sharer; None where it does not speak."""


@dataclass(frozen=True)
class SharerInputs:
    """What one sharer reads of a batch."""

    ids: torch.Tensor
    """(B, M)"""
    mask: torch.Tensor
    """(B, M)"""
    alignment: torch.Tensor
    """(B, N) column of the sharer for each column of the receiver."""
    due: torch.Tensor
    """(B, N) when each receiver column is fused: once the receiver has read this many columns; 0 is never."""


@dataclass(frozen=True)
class Inputs:
    """A batch, ready to be read."""

    ids: torch.Tensor
    """(B, N)"""
    mask: torch.Tensor
    """(B, N)"""
    sharers: tuple[SharerInputs | None, ...]
    """One per sharer of the pair; None if it speaks in no row."""


def row(
    messages: Conversation,
    receiver: LanguageModel,
    sharers: Sequence[Sharer],
    fusers: Sequence[Fuser],
    speaking: Sequence[int],
    timings: Timings,
    template: str | None = None,
) -> Row:
    """Render, tokenise and align one conversation.

    Args:
        speaking: indices of the sharers that speak.
        template: the receiver's, see `text.chat.render`.

    Raises:
        ConversationError, TemplateError: the conversation cannot be rendered.
        AlignmentError: the two sides cannot be aligned.
        ContextLengthError: the prompt is longer than a model's context.
    """
    with clock(timings, "tokenise"):
        own = render(receiver.tokenizer, messages, template=template)
        theirs = {
            i: render(sharers[i].tokenizer, messages, template=fusers[i].config.sharer_template)
            for i in speaking
            if fusers[i].config.alignment == "native"
        }
    rows: list[SharerRow | None] = [None] * len(sharers)
    with clock(timings, "align"):
        for i in speaking:
            config = fusers[i].config
            if config.alignment == "native":
                ids, alignment = theirs[i].ids, align(own, theirs[i])
                due = whole(len(own.ids))
            elif config.alignment == "same-ids":
                ids, alignment = own.ids, np.arange(len(own.ids))
                due = whole(len(own.ids))
            else:
                ids, alignment, due = _retokenised(messages, receiver, sharers[i], fusers[i])
            rows[i] = SharerRow(ids, alignment, only_last(due, config.fuse_last))
    return _checked(Row(own.ids, tuple(rows)), receiver, sharers)


def whole(size: int) -> np.ndarray:
    """(N,) one span: every position but the last, fused together."""
    due = np.full(size, size - 1)
    due[-1:] = 0
    return due


def only_last(due: np.ndarray, last: int | None) -> np.ndarray:
    """Of the positions to be fused, only those among the prompt's `last` ones before its last."""
    if last is not None:
        due = due.copy()
        due[: max(len(due) - 1 - last, 0)] = 0
    return due


def _retokenised(messages: Conversation, receiver: LanguageModel, sharer: Sharer, fuser: Fuser):
    """The published fusers' alignment, and their spans: message by message, templates left as they are."""
    config = fuser.config
    both = retokenise(
        messages,
        receiver.tokenizer,
        sharer.tokenizer,
        "first" if config.alignment == "retokenise-first" else "longest",
        receiver_template=config.receiver_template,
        sharer_template=config.sharer_template,
    )
    due = np.zeros(len(both.receiver_ids), dtype=np.int64)
    read = np.cumsum(~both.receiver_padding)
    for section in both.sections:
        if section.message:
            due[section.start : section.stop] = read[section.stop - 1]
    # A prompt that ends in content is fused before its last token, which stays unread.
    due = np.minimum(due[~both.receiver_padding], np.count_nonzero(~both.receiver_padding) - 1)
    due[-1:] = 0
    return both.sharer_ids[~both.sharer_padding], both.alignment, due


def _checked(row: Row, receiver: LanguageModel, sharers: Sequence[Sharer]) -> Row:
    check_length(receiver, len(row.ids), 1)
    check_vocabulary(receiver, row.ids)
    for lm, part in zip(sharers, row.sharers, strict=True):
        if part is not None:
            check_length(lm, len(part.ids), 0)
            check_vocabulary(lm, part.ids)
    return row


def check_vocabulary(lm: Sharer, ids: np.ndarray | torch.Tensor) -> None:
    """Raise AlignmentError unless the model has an embedding for each of these ids."""
    vocabulary = lm.card.geometry.vocab_size
    low, high = (int(ids.min()), int(ids.max())) if len(ids) else (0, 0)
    if low < 0 or (vocabulary and high >= vocabulary):
        raise AlignmentError(
            f"{lm.card.id} is given token ids that it does not have", got=high if low >= 0 else low,
            allowed=f"0–{vocabulary - 1}" if vocabulary else "0 and above",
            hint="If tokens were added to its tokenizer, call resize_token_embeddings on the model",
        )  # fmt: skip


def check_length(lm: Sharer, prompt: int, new: int, context: int | None = None) -> None:
    """Raise ContextLengthError unless prompt and new tokens fit into the model's context, or into another one."""
    longest = lm.card.geometry.max_positions if context is None else context
    if longest is not None and prompt + new > longest:
        raise ContextLengthError(
            f"the prompt does not fit into the context of {lm.card.id}",
            got=f"{prompt} tokens and {new} to be written",
            allowed=f"{longest} together",
            hint="Shorten the conversation or ask for fewer tokens",
        )


def collate(rows: Sequence[Row], pad: int, sharer_pads: Sequence[int]) -> Inputs:
    """Pad rows on the left into one batch."""
    ids, mask = padded([row.ids for row in rows], pad)
    width = ids.shape[1]
    sharers: list[SharerInputs | None] = []
    for i, sharer_pad in enumerate(sharer_pads):
        parts = [row.sharers[i] for row in rows]
        if not any(parts):
            sharers.append(None)
            continue
        # A row in which this sharer is silent gets one token to read, since a batch has no empty rows.
        their_ids, their_mask = padded([np.zeros(1, np.int64) if p is None else p.ids for p in parts], sharer_pad)
        alignment, due = torch.zeros((2, len(rows), width), dtype=torch.long)
        for b, part in enumerate(parts):
            if part is not None:
                left = width - len(part.alignment)
                alignment[b, left:] = torch.as_tensor(part.alignment) + their_ids.shape[1] - len(part.ids)
                due[b, left:] = torch.as_tensor(np.where(part.due > 0, part.due + left, 0))
        sharers.append(SharerInputs(their_ids, their_mask, alignment, due))
    return Inputs(ids, mask, tuple(sharers))


def padded(rows: Sequence[np.ndarray], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids (B, N) padded on the left, and their mask (B, N)."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.long)
    for b, row in enumerate(rows):
        if len(row):
            ids[b, width - len(row) :] = torch.as_tensor(row)
            mask[b, width - len(row) :] = 1
    return ids, mask
