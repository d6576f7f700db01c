"""Long texts from one model for many prompts: rows that have ended leave the batch, the others go on."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from cache2cache.decoding import GREEDY
from cache2cache.evaluate.scoring import ends_turn
from cache2cache.inputs import Inputs
from cache2cache.models import kv
from cache2cache.models.prefills import by_length, left_padded, prefill_rows
from cache2cache.pipeline import C2C, Prefill
from cache2cache.types import Conversation

_STRIDE = 32
"""Tokens between two looks at who has ended."""

_BATCH_TOKENS = 2048
"""Of one forward pass over prompts."""


def write(lm: C2C, conversations: Sequence[Conversation], limit: int) -> tuple[list[list[int]], list[int]]:
    """What a model writes to each conversation, greedily, and how many tokens it read of each.

    Args:
        limit: most tokens of a text.

    Returns:
        Token ids without padding, and prompt tokens; a list each, in order.
    """
    prefill = _read(lm, conversations)
    read = prefill.mask.sum(1).tolist()
    texts: list[list[int]] = [[] for _ in conversations]
    rows = list(range(len(conversations)))
    while True:
        step = min(_STRIDE, limit - len(texts[rows[0]]))
        answers = lm.decode(prefill, **GREEDY, max_new_tokens=step)
        raw = answers[0].raw
        for row, answer in zip(rows, answers, strict=True):
            texts[row] += answer.ids  # up to the end token, so without padding
        going = [i for i, row in enumerate(rows) if not _ended(lm, answers[i].ids, texts[row], step, limit)]
        if not going:
            return texts, read
        ids = raw[going].cpu()
        mask = torch.cat([prefill.mask[going], torch.ones(len(going), ids.shape[1] - prefill.mask.shape[1])], 1).long()
        kv.select_rows(prefill.cache, going)
        rows = [rows[i] for i in going]
        prefill = Prefill(Inputs(ids, mask, ()), prefill.cache, [])


def _read(lm: C2C, conversations: Sequence[Conversation]) -> Prefill:
    """One batch, read in parts of about the same length, so that little padding is read."""
    rows = lm.rows(conversations)
    prompts = [row.ids[:-1] for row in rows]
    caches: dict[int, torch.Tensor] = {}
    for batch in by_length(prompts, _BATCH_TOKENS):
        caches |= zip(batch, prefill_rows(lm.receiver, [prompts[i] for i in batch]), strict=True)
    whole = left_padded([caches[i] for i in range(len(rows))]).to(lm.receiver.device)
    inputs = lm.collate(rows)
    return Prefill(inputs, kv.from_tensors(list(zip(*whole, strict=True))), [])


def _ended(lm: C2C, new: Sequence[int], text: Sequence[int], step: int, limit: int) -> bool:
    return len(new) < step or ends_turn(lm.receiver, new) or len(text) >= limit
