"""Training rows with what the frozen models say of them: computed ahead and read from disk, or left to be computed live."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from accelerate import PartialState
from rich.console import Console
from torch.utils.data import Dataset

from cache2cache.errors import RecipeError
from cache2cache.models.disk import human
from cache2cache.models.disk import size as size_of
from cache2cache.models.filling import check_disk
from cache2cache.models.prefills import PrefillStore, row_key
from cache2cache.pipeline import C2C
from cache2cache.train.arguments import device_of
from cache2cache.train.batch import Item, Teacher, TrainRow
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.prepare import Prepared, load_pair, prepare_rows
from cache2cache.train.statistics import mapped
from cache2cache.train.taught import TeacherStore, position_bytes, untaught


class FeatureDataset(Dataset[Item]):
    """Training rows and their features.

    Of the receiver that is its cache up to where it is first fused: later positions are read over a fused cache, which
    changes with the fuser. Of the sharer, the mapped layers at the positions that are heard.

    Args:
        folder: of `PrefillStore`s, which may be shared by all runs; what is missing is computed first. None leaves the
            features out of the items, to be computed when they are needed.
        teachers: the sharer's distributions, one for each row.

    Raises:
        DataError: see `PrefillStore.compute`.
    """

    def __init__(
        self, rows: Sequence[TrainRow], pair: C2C, folder: Path | None, teachers: Sequence[Teacher] | None = None
    ):
        self.rows, self.teachers = rows, teachers
        self._layers = mapped(pair)
        self._stores = None if folder is None else _stores(pair, folder)
        if self._stores is not None:
            own, theirs = self._stores
            own.compute(pair.receiver, [row.row.ids[: row.first_stop] for row in rows])
            theirs.compute(pair.sharers[0], map(_their_ids, rows), [row.heard_at for row in rows], self._layers)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Item:
        row = self.rows[index]
        teacher = None if self.teachers is None else self.teachers[index]
        if self._stores is None:
            return Item(row, teacher=teacher)
        own, theirs = self._stores
        return Item(
            row,
            own.load(row.row.ids[: row.first_stop]),
            theirs.load(_their_ids(row), row.heard_at, self._layers),
            teacher,
        )


@dataclass(frozen=True)
class Missing:
    """What a folder of features lacks of some rows, each prompt once."""

    own: list[np.ndarray]
    """What the receiver has to read."""
    theirs: list[TrainRow]
    """Of what the sharer has to read."""
    size: int
    """Bytes that will be added."""


def missing(rows: Sequence[TrainRow], pair: C2C, folder: Path) -> Missing:
    """Of the features of these rows."""
    own, theirs = _stores(pair, folder)
    layers = mapped(pair)
    prompts = {row_key(ids): ids for ids in (row.row.ids[: row.first_stop] for row in rows)}
    read = [ids for ids in prompts.values() if not own.holds(ids)]
    heard = {row_key(_their_ids(row)): row for row in rows}
    lacking = [row for row in heard.values() if not theirs.holds(_their_ids(row), row.heard_at, layers)]
    positions = sum(len(np.unique(row.heard_at)) for row in lacking)
    size = own.bytes_for(sum(map(len, read))) + theirs.bytes_for(positions, len(layers))
    return Missing(read, lacking, size)


def check_room(recipe: Recipe, prepared: Prepared, pair: C2C, folder: Path) -> None:
    """Before hours of work: whether everything that a run keeps in its folder of features fits on the disk.

    Raises:
        DataError: it does not.
    """
    size = missing([*prepared.train, *prepared.validation], pair, folder).size
    if recipe.objective.distill:
        top = recipe.objective.distill_top
        size += position_bytes(top) * sum(len(row.response) for row in untaught(prepared.train, pair, folder, top))
    check_disk(folder, "features", size)


def precompute(recipe: Recipe, machine: Machine) -> None:
    """Compute and keep what a run of this recipe will read: prefills, and the sharer's distributions if it distils.

    With several processes, all of them call this and share the work.

    Raises:
        RecipeError: a recipe that streams its rows, or a machine without a folder of features.
        DataError: see `check_room`, `PrefillStore.compute`.
    """
    if recipe.data.stream:
        raise RecipeError(
            "a recipe with data.stream has no features to compute ahead: each is computed when it is needed",
            hint="Train without this step",
        )
    if machine.features is None:
        raise RecipeError("features need a folder", hint="Give one with --features")
    everyone = PartialState(cpu=device_of(machine).type == "cpu")
    pair = load_pair(recipe, machine)
    prepared = prepare_rows(recipe, pair, machine)
    check_room(recipe, prepared, pair, machine.features)
    folders = []
    if recipe.objective.distill:
        folders.append(TeacherStore(prepared.train, pair, machine.features, recipe.objective.distill_top).folder)
    for rows in (prepared.train, prepared.validation):
        FeatureDataset(rows, pair, machine.features)
    folders += dict.fromkeys(store.folder for store in _stores(pair, machine.features))
    if everyone.is_main_process:
        for folder in folders:
            Console().print(f"{folder}: {human(size_of(folder))}", markup=False, highlight=False, soft_wrap=True)


def _stores(pair: C2C, folder: Path) -> tuple[PrefillStore, PrefillStore]:
    """The receiver's and the sharer's: the same one if a model is its own sharer."""
    receiver, (sharer,) = pair.receiver, pair.sharers
    own = PrefillStore(folder, receiver.card, receiver.dtype)
    alone = (receiver.card, receiver.dtype) == (sharer.card, sharer.dtype)
    return own, own if alone else PrefillStore(folder, sharer.card, sharer.dtype)


def _their_ids(row: TrainRow) -> np.ndarray:
    """(M,) what the sharer reads."""
    return row.row.sharers[0].ids  # type: ignore[union-attr]
