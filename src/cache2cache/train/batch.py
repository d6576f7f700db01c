"""What moves through a training run: an example, its tokens, and batches of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cache2cache.inputs import Inputs, Row, SharerInputs
from cache2cache.models import kv
from cache2cache.pipeline import C2C
from cache2cache.types import Message


@dataclass(frozen=True)
class Example:
    """One training row as text."""

    messages: list[Message]
    """The prompt."""
    response: str
    asked: str
    """What must not be an evaluation question: a question without its options, or a prompt's last message."""
    place: str
    """Where it lies, for messages to people: "arc_easy/train.jsonl.zst, line 12"."""
    alone: bool = False
    """Whether it is to be answered as the receiver alone would, see `config.Source.learn`."""


@dataclass(frozen=True)
class Teacher:
    """The sharer's next-token distributions over tokens that both models have, along a response of T receiver tokens."""

    ids: torch.Tensor
    """(T, K) receiver token ids, the likeliest first."""
    logprobs: torch.Tensor
    """(T, K) float32, normalised over the K tokens; −inf where fewer than K are shared, and in all of a row whose position
    is no token boundary of the sharer's."""


@dataclass(frozen=True)
class TrainRow:
    """One training row as tokens."""

    row: Row
    """The prompt on both sides, with one sharer."""
    response: np.ndarray
    """(T,) the receiver's tokens that are learned: the response and the end of its turn, or the beginning of that."""
    text: str
    """The whole response as text, without the end of the turn."""
    place: str = ""
    """Where it lies, as in `Example`."""
    alone: bool = False
    """As in `Example`."""
    everywhere: bool = False
    """Whether it was made by `everywhere.everywhere`: `row` is prompt and response, but for the last token, and `response`
    (T,) what follows the last T of those, −100 where that is not learned."""

    @property
    def first_stop(self) -> int:
        """Receiver positions that are read before anything is fused."""
        due = self.row.sharers[0].due  # type: ignore[union-attr]
        return int(due[due > 0].min()) if due.any() else len(self.row.ids) - 1

    @property
    def heard(self) -> np.ndarray:
        """(P,) the receiver's positions that are fused, in order."""
        return np.flatnonzero(self.row.sharers[0].due)  # type: ignore[union-attr]

    @property
    def heard_at(self) -> np.ndarray:
        """(P,) the sharer's positions that those are aligned to."""
        return self.row.sharers[0].alignment[self.heard]  # type: ignore[union-attr]


@dataclass(frozen=True)
class Item:
    """One training row with whatever was computed ahead."""

    row: TrainRow
    own: torch.Tensor | None = None
    """(2, L_r, H_r, first_stop, D_r) the receiver's cache up to where it is first fused."""
    theirs: torch.Tensor | None = None
    """(2, U, H_s, P, D_s) the sharer's cache at `heard_at`, of the U layers that are mapped, in ascending order."""
    teacher: Teacher | None = None
    untaught: bool = False
    """Whether the sharer is still to be asked for a teacher, once it is certain that the row will be trained on."""


class Collator:
    """Items → one batch of tensors: prompts padded on the left, responses on the right.

    Keys, with W the columns from the first that is fused in any row to the prompt's last but one:

    - ids, mask (B, N); sharer_ids, sharer_mask (B, M); alignment, due (B, N): as in `inputs.Inputs`.
    - response (B, T): the response, padded with 0. labels (B, T): the same, padded with −100. Of rows that are fused
      everywhere both are padded on the left.
    - own (2, L_r, B, H_r, S, D_r), theirs (2, U, B, H_s, W, D_s): as in `Item`, the latter for the columns N − 1 − W to N − 2
      and zero where nothing is fused. S is the first column at which a row is fused. Absent unless they were computed ahead.
    - their_positions (B, W): position ids of the sharer's keys.
    - teacher_ids, teacher_logprobs (B, T, K): absent without teachers.
    - alone (B,): whether the row is to be answered as the receiver alone would.
    - places: where the rows lie, for people.
    - rows: the `TrainRow`s, of items that are untaught.
    """

    def __init__(self, pair: C2C):
        self._pair = pair

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        rows = [item.row for item in items]
        prepared = self._pair.collate([row.row for row in rows])
        (part,) = prepared.sharers
        assert part is not None, "every training row has a sharer"
        response, labels = _responses(rows)
        width = grid_width(part.due)
        batch: dict[str, Any] = {
            "ids": prepared.ids, "mask": prepared.mask, "sharer_ids": part.ids, "sharer_mask": part.mask,
            "alignment": part.alignment, "due": part.due, "response": response, "labels": labels,
            "alone": torch.tensor([row.alone for row in rows]), "places": [row.place for row in rows],
            "their_positions": kv.position_ids(part.mask).gather(1, grid(part.alignment, width)),
        }  # fmt: skip
        if items[0].own is not None and items[0].theirs is not None:
            batch |= {"own": _own(items, prepared, part), "theirs": _theirs(items, part, width)}
        if items[0].teacher is not None:
            batch |= taught([item.teacher for item in items], response.shape[1])  # type: ignore[misc]
        if items[0].untaught:
            batch["rows"] = rows
        return batch


def as_inputs(batch: dict[str, Any]) -> Inputs:
    """The request path's view of a batch."""
    part = SharerInputs(batch["sharer_ids"], batch["sharer_mask"], batch["alignment"], batch["due"])
    return Inputs(batch["ids"], batch["mask"], (part,))


def grid_width(due: torch.Tensor) -> int:
    """W, from `due` (B, N)."""
    fused = due.any(0).nonzero()
    return due.shape[1] - 1 - int(fused[0]) if len(fused) else 0


def grid(columns: torch.Tensor, width: int) -> torch.Tensor:
    """(B, N) → (B, W), the columns N − 1 − W to N − 2."""
    return columns[:, columns.shape[1] - 1 - width : columns.shape[1] - 1]


def first_stop(due: torch.Tensor) -> int:
    """S, from `due` (B, N): the column up to which the receiver reads before anything is fused."""
    fused = due[due > 0]
    return int(fused.min()) if len(fused) else due.shape[1] - 1


def _responses(rows: Sequence[TrainRow]) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row.response) for row in rows)
    labels = torch.full((len(rows), width), -100)
    for b, row in enumerate(rows):
        size = len(row.response)
        labels[b, slice(width - size, None) if row.everywhere else slice(size)] = torch.as_tensor(row.response)
    return labels.clamp(min=0), labels


def _own(items: Sequence[Item], prepared: Inputs, part: SharerInputs) -> torch.Tensor:
    """Left-padded to N columns, and cut off at S: what is fused first in one row may be read later in another."""
    stop = first_stop(part.due)
    first = items[0].own
    assert first is not None
    # Of a CPU's step, passes over this tensor are a good part, so only what is padding is cleared.
    out = first.new_empty((*first.shape[:2], len(items), first.shape[2], stop, first.shape[4]))
    for b, item in enumerate(items):
        assert item.own is not None
        left = min(prepared.ids.shape[1] - len(item.row.row.ids), stop)
        out[:, :, b, :, :left] = 0
        out[:, :, b, :, left:] = item.own[:, :, :, : stop - left]
    return out


def _theirs(items: Sequence[Item], part: SharerInputs, width: int) -> torch.Tensor:
    first = items[0].theirs
    assert first is not None
    out = first.new_zeros((*first.shape[:2], len(items), first.shape[2], width, first.shape[4]))
    fused = grid(part.due, width) > 0
    for b, item in enumerate(items):
        assert item.theirs is not None
        out[:, :, b, :, fused[b]] = item.theirs
    return out


def taught(teachers: Sequence[Teacher], width: int) -> dict[str, torch.Tensor]:
    """What a batch with responses of this width holds of teachers, see `Collator`."""
    ids = torch.zeros((len(teachers), width, teachers[0].ids.shape[1]), dtype=torch.long)
    logprobs = torch.full(ids.shape, -torch.inf)
    for b, teacher in enumerate(teachers):
        size = len(teacher.ids)
        ids[b, :size], logprobs[b, :size] = teacher.ids, teacher.logprobs
    return {"teacher_ids": ids, "teacher_logprobs": logprobs}
