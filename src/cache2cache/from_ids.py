"""From token ids to the tensors that the request path runs on, for callers that tokenise by themselves."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from cache2cache.errors import AlignmentError
from cache2cache.fuser.base import Fuser
from cache2cache.inputs import Inputs, SharerInputs, check_length, check_vocabulary, only_last, whole
from cache2cache.models.load import LanguageModel, Sharer
from cache2cache.pair import speaking
from cache2cache.types import Span


def from_ids(
    receiver_ids: torch.Tensor,
    sharer_ids: Sequence[torch.Tensor | None],
    receiver: LanguageModel,
    sharers: Sequence[Sharer],
    fusers: Sequence[Fuser],
    *,
    speakers: Sequence[int] | Sequence[Sequence[int]] | None = None,
    receiver_mask: torch.Tensor | None = None,
    sharer_masks: Sequence[torch.Tensor | None] | None = None,
    alignments: Sequence[torch.Tensor | None] | None = None,
    spans: Sequence[Span] | None = None,
) -> Inputs:
    """A batch from token ids.

    Args:
        receiver_ids: (B, N), padded on the left.
        sharer_ids: per sharer (B, M), or None if it does not speak.
        speakers: indices of the sharers that speak, for all rows or one list per row. All by default.
        receiver_mask, sharer_masks: 1 for real tokens, the receiver's on the right; all real by default.
        alignments: per sharer (B, N) column of the sharer for each column of the receiver; by default position for
            position, which needs M = N.
        spans: runs of columns that are fused together, or not, as soon as the receiver has read them; columns
            between spans are not fused. One span over all but the last token by default.

    Raises:
        AlignmentError: what is no ids, ids that a model does not have, shapes that do not belong together, indices out of range,
            spans that overlap, padding that is not on the left or would be fused.
        ContextLengthError: more columns than a model's context.
        FuserMismatchError: `speakers` that are no indices.
    """
    _check_ids("receiver_ids", receiver_ids, receiver, 1)
    batch, width = receiver_ids.shape
    mask = torch.ones_like(receiver_ids) if receiver_mask is None else receiver_mask
    _same_shape("receiver_mask", mask, receiver_ids)
    if not (mask[:, -1].all() and (mask.long().diff(dim=1) >= 0).all()):
        raise AlignmentError(
            "the receiver's ids are not padded on the left", hint='Set tokenizer.padding_side = "left"'
        )
    if len(sharer_ids) != len(fusers):
        raise AlignmentError("one tensor of sharer ids per sharer is needed", got=len(sharer_ids), allowed=len(fusers))
    spoken = speaking(speakers, len(sharers), batch)
    parts: list[SharerInputs | None] = []
    for i, (ids, lm, fuser) in enumerate(zip(sharer_ids, sharers, fusers, strict=True)):
        heard = torch.tensor([i in who for who in spoken])
        if ids is None or not heard.any():
            parts.append(None)
            continue
        _check_ids(f"sharer_ids[{i}]", ids, lm, 0)
        given_mask = sharer_masks[i] if sharer_masks else None
        their_mask = torch.ones_like(ids) if given_mask is None else given_mask
        _same_shape(f"sharer_masks[{i}]", their_mask, ids)
        given = alignments[i] if alignments else None
        if given is None and ids.shape != receiver_ids.shape:
            raise AlignmentError(
                f"sharer {i} reads other columns than the receiver and no alignment was given",
                got=f"{tuple(ids.shape)} beside {tuple(receiver_ids.shape)}", hint="Pass alignments=[…]",
            )  # fmt: skip
        alignment = torch.arange(width).expand(batch, width) if given is None else given
        _same_shape(f"alignments[{i}]", alignment, receiver_ids)
        if int(alignment.min()) < 0 or int(alignment.max()) >= ids.shape[1]:
            raise AlignmentError(
                f"alignments[{i}] leaves the sharer's columns",
                got=f"{int(alignment.min())}–{int(alignment.max())}", allowed=f"0–{ids.shape[1] - 1}",
            )  # fmt: skip
        due = torch.as_tensor(only_last(_spans(spans, width), fuser.config.fuse_last)) * mask.bool() * heard[:, None]
        if not their_mask.gather(1, alignment.long())[due > 0].all():
            raise AlignmentError(
                f"a column that is fused is aligned to padding of sharer {i}", hint="Give its mask and its alignment"
            )
        parts.append(SharerInputs(ids, their_mask, alignment, due))
    return Inputs(receiver_ids, mask, tuple(parts))


def _spans(spans: Sequence[Span] | None, width: int) -> np.ndarray:
    """(N,) when each column is fused, see `SharerInputs.due`."""
    if spans is None:
        return whole(width)
    due, at = np.zeros(width, dtype=np.int64), 0
    for span in spans:
        if not at <= span.start < span.stop <= width - 1:
            raise AlignmentError(
                "spans must be in order, not overlap, and leave the prompt's last token out",
                got=list(spans), allowed=f"columns 0–{width - 2}",
            )  # fmt: skip
        at = span.stop
        due[span.start : at] = at if span.fuse else 0
    return due


def _same_shape(name: str, got: torch.Tensor, like: torch.Tensor) -> None:
    if got.shape != like.shape:
        raise AlignmentError(f"{name} has the wrong shape", got=tuple(got.shape), allowed=tuple(like.shape))


def _check_ids(name: str, ids: object, lm: Sharer, new: int) -> None:
    if not isinstance(ids, torch.Tensor) or ids.dim() != 2 or not ids.numel() or ids.is_floating_point():
        got = f"{ids.dtype} {tuple(ids.shape)}" if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise AlignmentError(
            f"{name} is no batch of token ids", got=got, allowed="a tensor of integers (rows, columns)"
        )
    check_vocabulary(lm, ids)
    check_length(lm, ids.shape[1], new)
