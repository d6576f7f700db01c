"""What a run is made of before anything is trained: the pair with a fresh fuser, and the rows as tokens."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch
from accelerate import PartialState
from pydantic import ValidationError
from rich.console import Console
from transformers import set_seed

from cache2cache.errors import DataError, RecipeError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.layer_map import LAYER_MAPS
from cache2cache.fuser.strict import in_words
from cache2cache.models.load import load
from cache2cache.pipeline import C2C
from cache2cache.train import sources
from cache2cache.train.arguments import device_of
from cache2cache.train.batch import TrainRow
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.contamination import Contamination, Dropped, read_held_out
from cache2cache.train.rows import train_rows
from cache2cache.train.statistics import STATISTICS_ROWS
from cache2cache.train.stream import RowStream
from cache2cache.types import ModelCard


@dataclass(frozen=True)
class Prepared:
    """A recipe's rows as tokens."""

    train: list[TrainRow]
    """Of a stream the first ones, `first_of`."""
    validation: list[TrainRow]
    dropped: list[Dropped]
    """Training rows that give an evaluation away, and rows that are too long or teach nothing."""
    avoid: Contamination = field(repr=False)
    """What keeps a stream's rows away from the evaluation."""

    @property
    def digest(self) -> str:
        """Of all rows that are held, as both models read them, in order; of a stream so of its first ones."""
        found = hashlib.sha256()
        for rows in (self.train, self.validation):
            for row in rows:
                for ids in (row.row.ids, row.row.sharers[0].ids, row.response):  # type: ignore[union-attr]
                    found.update(len(ids).to_bytes(8, "little") + np.asarray(ids, dtype="<i8").tobytes())
            found.update(b"rows end here")
        return found.hexdigest()


def load_pair(recipe: Recipe, machine: Machine) -> C2C:
    """Both models and a fresh fuser. A receiver that is its own sharer is loaded once.

    Raises:
        RecipeError: a layer map, gates or a fuser to begin with that do not fit.
        FuserFormatError, FuserMismatchError: no such fuser to begin with, or one of another pair.
        ModelError, UnknownModelError, DownloadError: see `models.load.load`.
    """
    device = device_of(machine)
    theirs = torch.device(machine.sharer_device) if machine.sharer_device else device
    options: dict[str, Any] = {"dtype": recipe.dtype, "trust_remote_code": machine.trust_remote_code}
    receiver = load(recipe.receiver, device=device, **options)
    alone = recipe.sharer == recipe.receiver and theirs == device
    sharer = receiver if alone else load(recipe.sharer, device=theirs, **options)
    config = new_config(recipe, receiver.card, sharer.card)
    set_seed(recipe.seed)
    fuser = Fuser.from_config(config)
    if recipe.fuser.init is not None:
        trained = fuser_to_begin_with(fuser, recipe.fuser.init)
        # The gates, too, if they are to be learned; otherwise those are the recipe's.
        gates = {} if config.gate.learned else {"gate.logit": fuser.gate.logit.detach()}
        fuser.load_state_dict(trained.state_dict() | gates)
    return C2C(receiver, [sharer], [fuser])


def fuser_to_begin_with(fuser: Fuser, name: str) -> Fuser:
    """A trained fuser whose weights and statistics `fuser` can take over.

    Raises:
        RecipeError: it is of another kind, or has other sizes or another layer map.
        FuserFormatError, FuserMismatchError, DownloadError: no such fuser, or one of another pair.
    """
    trained = Fuser.from_pretrained(name)
    got, wanted = (
        {"kind": x.config.kind, "sizes": x.sizes.model_dump(), "layer_map": list(x.config.layer_map)}
        for x in (trained, fuser)
    )
    if other := [field for field in got if got[field] != wanted[field]]:
        raise RecipeError(
            f"fuser.init names a fuser of another build: {name}",
            got=", ".join(f"{field} {got[field]}" for field in other),
            allowed=", ".join(f"{field} {wanted[field]}" for field in other),
        )
    trained.check_pair(fuser.config.receiver, fuser.config.sharer)
    return trained


def new_config(recipe: Recipe, receiver: ModelCard, sharer: ModelCard) -> FuserConfig:
    """The config of the fuser that a recipe describes, for this pair.

    Raises:
        RecipeError: a layer map or gates that do not fit the models.
    """
    part = recipe.fuser
    layer_map = part.layer_map
    if isinstance(layer_map, str):
        layer_map = LAYER_MAPS[layer_map](receiver.geometry.layers, sharer.geometry.layers)
    try:
        return FuserConfig(
            receiver=receiver,
            sharer=sharer,
            layer_map=layer_map,
            **part.model_dump(exclude={"layer_map", "init"}),
        )
    except ValidationError as error:
        raise RecipeError("the fuser does not fit the pair", got=in_words(error)) from error


def prepare_rows(recipe: Recipe, pair: C2C, machine: Machine) -> Prepared:
    """Read a recipe's rows, leave out those that give an evaluation away, and tokenise the others.

    Validation rows count as evaluation too. Of a stream the first rows are read, which training reads again.

    Raises:
        DataError, RecipeError, DownloadError, MissingExtraError: see `sources.read`.
        ContextLengthError: see `rows.train_rows`.
        DataError: no row is left, or none is fused anywhere.
    """
    data = recipe.data
    chosen = sources.read(data.validation, machine, seed=recipe.rows_seed, turns=data.turns, apart=True)
    avoid = Contamination(read_held_out(data.held_out, machine), chosen)
    form: dict[str, Any] = {
        "max_tokens": data.max_tokens, "response_tokens": data.response_tokens, "fused": recipe.objective.fused,
    }  # fmt: skip
    validation, long_validation = train_rows(chosen, pair, **form)
    if data.stream:
        train = [item.row for item in islice(RowStream(recipe, pair, machine, avoid), first_of(recipe))]
        prepared = Prepared(train, validation, long_validation, avoid)
    else:
        examples = sources.read(data.train, machine, seed=recipe.rows_seed, turns=data.turns, keep=avoid.keep)
        train, long_train = train_rows(examples, pair, **form)
        prepared = Prepared(train, validation, [*avoid.dropped, *long_train, *long_validation], avoid)
    if not validation or not train:
        raise DataError("no row is left to train or to validate on", got=f"dropped: {_counted(prepared.dropped)}")
    if not any(len(row.heard) for row in train):
        raise DataError(
            "no position of any training row is fused, so nothing can be learned", got=f"fuse_last {recipe.fuser.fuse_last}",
            hint="Raise fuser.fuse_last: where messages are fused one by one, the prompt's last positions may be the template's",
        )  # fmt: skip
    say(_told(recipe, prepared))
    return prepared


def first_of(recipe: Recipe) -> int:
    """How many rows of a stream stand for all: they are measured, and a resumed run has to meet them again."""
    return max(STATISTICS_ROWS, recipe.optim.batch_size)


def _told(recipe: Recipe, prepared: Prepared) -> str:
    train = "a stream of" if recipe.data.stream else len(prepared.train)
    return f"{train} training rows, {len(prepared.validation)} for validation; dropped: {_counted(prepared.dropped)}"


def _counted(dropped: list[Dropped]) -> str:
    return ", ".join(f"{n} {reason}" for reason, n in Counter(row.reason for row in dropped).items()) or "none"


def say(line: str) -> None:
    """Tell people one line, once however many processes there are."""
    if PartialState().is_main_process:
        Console(stderr=True).print(line, markup=False, highlight=False, soft_wrap=True)
