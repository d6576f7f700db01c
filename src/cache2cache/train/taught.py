"""The sharer's distributions along training responses, computed once and kept on disk."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from cache2cache.models.filling import fill
from cache2cache.models.load import weights_fingerprint
from cache2cache.models.shards import Shards, damaged
from cache2cache.pipeline import C2C
from cache2cache.train.batch import Teacher, TrainRow
from cache2cache.train.teacher import SharedVocabulary, end_of_answer, teachers

_FORMULA = 2
"""Of what `teacher.teachers` computes: to be raised with every change of it, so that nothing stale is used."""

_BATCH_ROWS = 64
_IDS, _LOGPROBS = ".ids", ".logprobs"
_ID_DTYPE = torch.int32


def taught(rows: Sequence[TrainRow], pair: C2C, folder: Path | None, top: int) -> Sequence[Teacher]:
    """The sharer's distributions along the response of each row.

    Args:
        folder: of stores, which may be shared by all runs; what is missing is computed first. None keeps all in memory.
        top: tokens of a distribution.

    Raises:
        DataError: see `filling.fill`.
    """
    if folder is None:
        return list(teachers(rows, pair, SharedVocabulary(pair), top))
    return TeacherStore(rows, pair, folder, top)


@dataclass(frozen=True)
class _Lesson:
    """A record that is wanted, see `filling.Job`."""

    key: str
    row: TrainRow
    size: int

    @property
    def tokens(self) -> int:
        part = self.row.row.sharers[0]
        return len(part.ids) + len(self.row.response)  # type: ignore[union-attr]


class TeacherStore(Sequence[Teacher]):
    """Distributions of training rows on disk, (T, K) ids and log-probabilities each.

    They are keyed by what the sharer reads, and lie in a folder named after the sharer, both tokenizers and K.

    Args:
        rows: computed first where they are missing. With several processes, each computes a part.
        root: folder of all stores.
        top: K, tokens of a distribution.
    """

    def __init__(self, rows: Sequence[TrainRow], pair: C2C, root: str | Path, top: int):
        (sharer,) = pair.sharers
        self._shards = _shards(pair, root, top)
        self._shards.claim(weights_fingerprint(sharer.model))
        self._keys = [_key(row) for row in rows]
        self._lengths = [len(row.response) for row in rows]
        self._top = top
        size = position_bytes(top)
        lessons = {key: _Lesson(key, row, size * len(row.response)) for key, row in zip(self._keys, rows, strict=True)}
        vocabulary = cache(lambda: SharedVocabulary(pair))  # not needed where nothing is missing
        fill(
            self._shards,
            f"distributions of {sharer.card.id}",
            list(lessons.values()),
            lambda lesson: bool(self._shards.holders(lesson.key + _IDS)),
            _batched,
            lambda batch: _computed(batch, pair, vocabulary(), top),
        )

    @property
    def folder(self) -> Path:
        """Of the shards."""
        return self._shards.folder

    def __len__(self) -> int:
        return len(self._keys)

    def __getitem__(self, index: int) -> Teacher:  # type: ignore[override]
        """Raise DataError if the shard is damaged."""
        key = self._keys[index]
        shard = self._shards.holders(key + _IDS)[0]  # the oldest: what others add never changes what a run has read
        ids, logprobs = shard.read(key + _IDS), shard.read(key + _LOGPROBS)
        if not ids.shape == logprobs.shape == (self._lengths[index], self._top):
            raise damaged(shard.path, f"{key} of shapes {tuple(ids.shape)} and {tuple(logprobs.shape)}")
        return Teacher(ids.long(), logprobs)


def untaught(rows: Sequence[TrainRow], pair: C2C, root: Path, top: int) -> list[TrainRow]:
    """The rows of which a `TeacherStore` would compute something, each once."""
    shards = _shards(pair, root, top)
    return [row for key, row in {_key(row): row for row in rows}.items() if not shards.holders(key + _IDS)]


def _shards(pair: C2C, root: str | Path, top: int) -> Shards:
    (sharer,), (fuser,) = pair.sharers, pair.fusers
    identity = {
        "sharer": sharer.card.model_dump(mode="json"), "dtype": str(sharer.dtype),
        "receiver_tokenizer": pair.receiver.card.tokenizer,
        "end": end_of_answer(sharer.tokenizer, fuser.config.sharer_template),
        "top": top, "formula": _FORMULA,
    }  # fmt: skip
    return Shards(root, f"teacher-{sharer.card.id}", identity, "teacher")


def _key(row: TrainRow) -> str:
    part = row.row.sharers[0]
    read = [part.ids.tolist(), row.response.tolist(), row.text]  # type: ignore[union-attr]
    return hashlib.sha256(json.dumps(read).encode()).hexdigest()[:24]


def position_bytes(top: int) -> int:
    """Disk space of one distribution."""
    return top * (_ID_DTYPE.itemsize + torch.float32.itemsize)


def _batched(lessons: Sequence[_Lesson]) -> Iterator[Sequence[_Lesson]]:
    """The longest first. What some batches leave over is split into just the others."""
    order = sorted(lessons, key=lambda lesson: -lesson.tokens)
    for start in range(0, len(order), _BATCH_ROWS):
        yield order[start : start + _BATCH_ROWS]


def _computed(lessons: Sequence[_Lesson], pair: C2C, vocabulary: SharedVocabulary, top: int) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    found_by = teachers([lesson.row for lesson in lessons], pair, vocabulary, top)
    for lesson, teacher in zip(lessons, found_by, strict=True):
        found |= {lesson.key + _IDS: teacher.ids.to(_ID_DTYPE), lesson.key + _LOGPROBS: teacher.logprobs}
    return found
