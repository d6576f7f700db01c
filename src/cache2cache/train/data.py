"""Training rows: a prompt for both models and the response that the receiver shall learn to give."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import Dataset

from cache2cache import inputs
from cache2cache.errors import DataError
from cache2cache.evaluate.questions import Contamination, Question, numbered_lines, read_questions
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.inputs import Row
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C, pad_id
from cache2cache.text.chat import check
from cache2cache.train.config import DataPart, Source
from cache2cache.train.features import PrefillStore
from cache2cache.types import Message


@dataclass(frozen=True)
class Example:
    """One training row."""

    messages: list[Message]
    """The prompt."""
    response: str
    question: Question | None = None

    @property
    def asked(self) -> str:
        """What must not be an evaluation question: the question, or a chat's last message."""
        return self.messages[-1]["content"] if self.question is None else self.question.question


def read_examples(path: Path) -> list[Example]:
    """Rows of a file: multiple choice, or chats whose last message is the assistant's.

    Raises:
        DataError: a row of another form.
    """
    _, first = next(numbered_lines(path), (0, None))
    if first is None:
        raise DataError(f"{path} has no rows")
    if "choices" in json.loads(first):
        return [Example(row.messages(), row.letter, row) for row in read_questions(path)]
    examples = []
    for number, line in numbered_lines(path):
        messages = json.loads(line).get("messages")
        try:
            check(messages)
        except ValueError as error:
            raise DataError(f"{path}, line {number} is no conversation", got=str(error)) from error
        if len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise DataError(f"{path}, line {number} does not end with an answer", got=messages[-1]["role"])
        examples.append(Example(messages[:-1], messages[-1]["content"]))
    return examples


def sample(
    folder: Path, sources: Sequence[Source], seed: int, avoid: Contamination | None = None
) -> tuple[list[Example], int]:
    """Rows of several files, without those that `avoid` knows, and how many those were."""
    chosen, dropped = [], 0
    for source in sources:
        rows = read_examples(folder / source.path)
        kept = [row for row in rows if avoid is None or row.asked not in avoid]
        dropped += len(rows) - len(kept)
        if source.limit is not None and source.limit > len(kept):
            raise DataError(f"{source.path} has too few rows", got=len(kept), allowed=f"at least {source.limit}")
        chosen += kept if source.limit is None else random.Random(seed).sample(kept, source.limit)
    return chosen, dropped


def split(folder: Path, data: DataPart, seed: int) -> tuple[list[Example], list[Example], int]:
    """Training rows, validation rows, and the number of rows dropped as contaminated."""
    validation, _ = sample(folder, data.validation, seed)
    held_out = [row for path in data.held_out for row in read_questions(folder / path)]
    held_out += [row.question for row in validation if row.question is not None]
    train, dropped = sample(folder, data.train, seed, Contamination(held_out))
    return train, validation, dropped


class FeatureDataset(Dataset):
    """Examples with both prefills from disk; computes those that are missing first.

    Item: the `Row` of an example, its response ids, and both caches (2, L, H, n, D).
    """

    def __init__(
        self, examples: Sequence[Example], pair: C2C, receiver_store: PrefillStore, sharer_store: PrefillStore
    ):
        (self.sharer,) = pair.sharers
        self.rows = pair.rows([example.messages for example in examples])
        self.responses = [response_ids(pair.receiver, e.response) for e in examples]
        self.stores = receiver_store, sharer_store
        receiver_store.compute(pair.receiver, [row.ids[:-1] for row in self.rows])
        sharer_store.compute(self.sharer, [row.sharers[0].ids for row in self.rows])  # type: ignore[union-attr]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Row, list[int], torch.Tensor, torch.Tensor]:
        row, (receiver_store, sharer_store) = self.rows[index], self.stores
        their_ids = row.sharers[0].ids  # type: ignore[union-attr]
        return row, self.responses[index], receiver_store.load(row.ids[:-1]), sharer_store.load(their_ids)


def response_ids(receiver: LanguageModel, response: str) -> list[int]:
    """Tokens of a response, with the end of the turn."""
    tokenizer = receiver.tokenizer
    return [*tokenizer(response, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]  # type: ignore[misc, list-item]


class Collator:
    """Items → one batch of tensors, prompts padded on the left, responses on the right."""

    def __init__(self, pair: C2C):
        self.pair = pair

    def __call__(self, items: Sequence[tuple[Row, list[int], torch.Tensor, torch.Tensor]]) -> dict[str, torch.Tensor]:
        """`tail_ids` (B, T) is the prompt's last token and the response but its last; `labels` (B, T) what follows."""
        rows, responses, own, theirs = zip(*items, strict=True)
        pads = [pad_id(lm) for lm in self.pair.sharers]
        batch = inputs.collate(rows, pad_id(self.pair.receiver), pads)
        (part,) = batch.sharers
        assert part is not None, "every training row has a sharer"
        width = max(map(len, responses))
        tail_ids = torch.zeros((len(rows), width), dtype=torch.long)
        labels = torch.full_like(tail_ids, -100)
        for b, (row, response) in enumerate(zip(rows, responses, strict=True)):
            tail_ids[b, : len(response)] = torch.tensor([int(row.ids[-1]), *response[:-1]])
            labels[b, : len(response)] = torch.tensor(response)
        return {
            "ids": batch.ids, "mask": batch.mask, "sharer_ids": part.ids, "sharer_mask": part.mask,
            "alignment": part.alignment, "due": part.due, "own": left_padded(own), "theirs": left_padded(theirs),
            "tail_ids": tail_ids, "labels": labels,
        }  # fmt: skip


def left_padded(caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """(2, L, H, n, D) each → (2, L, B, H, N, D), zeros on the left."""
    width = max(cache.shape[3] for cache in caches)
    first = caches[0]
    out = first.new_zeros((*first.shape[:2], len(caches), first.shape[2], width, first.shape[4]))
    for b, cache in enumerate(caches):
        out[:, :, b, :, width - cache.shape[3] :] = cache
    return out


class SharerDropout:
    """Lets random rows of a batch hear the mean sharer features in place of the sharer's cache.

    Args:
        rate: share of the rows, while training. At 1 it is every row, and not only while training.
        statistics: of the sharer's features.
    """

    def __init__(self, rate: float, statistics: FeatureStatistics):
        self.rate, self.statistics = rate, statistics

    def __call__(self, theirs: torch.Tensor, mask: torch.Tensor, *, training: bool) -> torch.Tensor:
        """Draws from torch's global generator of the CPU, which Trainer's checkpoints hold.

        Args:
            theirs: (2, L_s, B, H_s, M, D_s)
            mask: (B, M)
        Returns:
            As `theirs`, in float32: rounded to fewer bits, rotated means would tell their positions.
        """
        if not training and self.rate < 1:
            return theirs
        rows = (torch.rand(len(mask)) < self.rate).nonzero().squeeze(-1).to(theirs.device)
        if not len(rows):
            return theirs
        at = kv.position_ids(mask)[rows]
        mean = self.statistics.mean_cache(at.flatten()).unflatten(3, at.shape)  # (2, L, H, rows, M, D)
        return theirs.float().index_copy(2, rows, mean.transpose(2, 3))
