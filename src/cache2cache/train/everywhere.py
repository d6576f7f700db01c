"""Rows that teach as many fusions as their response has tokens.

In use, a cache is fused once, where the prompt ends. Of a row that is trained on in this way, each token of the response is read
behind a cache that is fused up to the token before it, as if prompt and response so far were the prompt. All of them are
read in one pass::

    keys of the token at column c:   clean j  where j < c and j is not fused for c
                                     fused j  where c − fuse_last ≤ j < c
                                     its own

What a fused position hears is what the sharer has read up to the character at which the *next* token begins, as at the end of
a prompt, where the last fused position hears the sharer's last.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch

from cache2cache.errors import ModelError
from cache2cache.inputs import Row, SharerRow
from cache2cache.models import trees
from cache2cache.models.geometry import attention_window
from cache2cache.pipeline import C2C
from cache2cache.train.batch import TrainRow
from cache2cache.train.pairing import paired


def everywhere(row: TrainRow, pair: C2C) -> TrainRow:
    """The row with its response, but for the last token, among what both models read ahead.

    Only tokens are learned before which both models are at the same character; elsewhere the sharer has read less or, worse,
    more than the receiver.

    Args:
        row: whose prompt is fused in one piece.

    Raises:
        DataError: see `pairing.paired`.
        ModelError: the receiver's attention has a window that is shorter than the row.
    """
    (part,), prompt, count = row.row.sharers, len(row.row.ids), len(row.response)
    assert part is not None, "every training row has a sharer"
    both = paired(row, pair)
    hears = np.zeros(count, dtype=np.int64)
    hears[both.met] = both.read
    hears = np.maximum.accumulate(np.maximum(hears, part.alignment[max(prompt - 2, 0)]))
    ids = np.concatenate([row.row.ids, row.response[:-1]])
    if not trees.sees_all(pair.receiver, len(ids)):
        raise ModelError(
            f"{pair.receiver.card.id} does not see a whole row in every layer, so it cannot be fused everywhere",
            got=f"{len(ids)} tokens",
            allowed=attention_window(pair.receiver.model.config),
            hint="Set data.max_tokens to shorten the row",
        )
    alignment = np.concatenate([part.alignment[:-1], hears[1:], hears[-1:]])
    due = np.where(np.concatenate([part.due[:-1] > 0, np.ones(count - 1, bool), [False]]), len(ids) - 1, 0)
    response = np.full(count, -100)
    response[both.met] = row.response[both.met]
    sharer = SharerRow(both.ids[: max(len(part.ids), int(alignment.max()) + 1)], alignment, due)
    return replace(row, row=Row(ids, (sharer,)), response=response, everywhere=True)


def seen(mask: torch.Tensor, due: torch.Tensor, width: int, queries: int, last: int | None) -> torch.Tensor:
    """(B, queries, N − 1 + width + queries) bool: what the last columns see of the clean cache, of the fused columns, and of
    themselves.

    Args:
        mask: (B, N), 1 for real tokens.
        due: (B, N), above 0 where something is fused.
        width: fused columns, the last ones but one.
        queries: columns that read.
        last: how many positions before a query are fused for it; None is all.
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    query, key = columns[-queries:, None], columns[None, :-1]
    before = key < query
    near = before if last is None else before & (key >= query - last)
    fused = near & (due[:, None, :-1] > 0)  # (B, queries, N − 1)
    clean = before & mask[:, None, :-1].bool() & ~fused
    itself = torch.eye(queries, dtype=torch.bool, device=mask.device).expand(len(mask), -1, -1)
    return torch.cat([clean, fused[:, :, fused.shape[2] - width :], itself], dim=2)
