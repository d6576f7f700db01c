"""How much work a recipe's rows make: steps and batches, and what the frozen models have to read."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache2cache.models import trees
from cache2cache.models.load import LanguageModel
from cache2cache.models.parts import Ids
from cache2cache.models.prefills import PrefillStore, by_length, default_batch_tokens, row_key
from cache2cache.models.skeleton import head_weight, layer_weights
from cache2cache.pipeline import C2C
from cache2cache.train.batch import TrainRow
from cache2cache.train.config import Recipe
from cache2cache.train.costs import prefill_cost
from cache2cache.train.features import missing
from cache2cache.train.order import Order
from cache2cache.train.statistics import mapped
from cache2cache.train.taught import position_bytes, untaught

Batch = Sequence[TrainRow]

_FETCHED_ROWS = 64


@dataclass(frozen=True)
class Schedule:
    """What a run does, if it does not stop early."""

    steps: int
    """Of the optimizer."""
    passes: int
    """Forward and backward, one batch each."""
    validations: int
    validation_passes: float
    """Batches of all validations, counted in typical training batches."""
    typical: Batch
    """Of the training batches the one that is nearest to their mean size, padding included."""
    largest: Batch
    judged: Batch
    """The largest of the validation."""

    @classmethod
    def of(cls, recipe: Recipe, rows: Sequence[TrainRow], validation: Sequence[TrainRow]) -> Schedule:
        """What a recipe makes of its rows; of a stream, `rows` are the first ones."""
        optim = recipe.optim
        batches = _batches(recipe, rows)
        per_epoch = math.ceil(len(batches) / optim.accumulate)
        steps = optim.max_steps or math.ceil(optim.epochs * per_epoch)
        # The last step of an epoch may have fewer batches than the others.
        passes = steps * optim.accumulate if recipe.data.stream else round(steps * len(batches) / per_epoch)
        full = [batch for batch in batches if len(batch) == len(batches[0])]
        mean = sum(map(columns, full)) / len(full)
        typical = min(full, key=lambda batch: abs(columns(batch) - mean))
        validations = math.ceil(steps / recipe.watch.eval_steps)  # the last step is always validated
        judged = [validation[at : at + optim.batch_size] for at in range(0, len(validation), optim.batch_size)]
        return cls(
            steps,
            passes,
            validations,
            validations * sum(map(_cells, judged)) / _cells(typical),
            typical,
            max(full, key=columns),
            max(judged, key=_cells),
        )

    def checkpoints(self, keep: int) -> int:
        """How many lie on the disk in the end: the newest and the best."""
        return min(keep + 1, self.validations)


def _batches(recipe: Recipe, rows: Sequence[TrainRow]) -> list[Batch]:
    """Of the first epoch, on one process."""
    optim = recipe.optim
    lengths = [len(row.row.ids) + len(row.response) for row in rows]
    order = list(Order(lengths, seed=recipe.seed, group=optim.batch_size * optim.accumulate if optim.bucket else None))
    starts = range(0, len(order), optim.batch_size)
    return [[rows[i] for i in order[start : start + optim.batch_size]] for start in starts]


def _cells(batch: Batch) -> int:
    return len(batch) * columns(batch)


def columns(batch: Batch) -> int:
    """Columns of a batch's tensors that the receiver or the fuser computes something of, padding included."""
    prompts = max(len(row.row.ids) for row in batch)
    heard = max((int(len(row.row.ids) - row.heard[0]) for row in batch if len(row.heard)), default=0)
    return prompts + heard + max(len(row.response) for row in batch)


def heard_by(row: TrainRow) -> np.ndarray:
    """(M,) what the sharer reads of a row."""
    return row.row.sharers[0].ids  # type: ignore[union-attr]


@dataclass(frozen=True)
class Reading:
    """What frozen models have to do."""

    seconds: float = 0.0
    memory: float = 0.0
    """Bytes at the fullest moment, beyond the models."""
    disk: float = 0.0
    """Bytes to be stored."""

    def __add__(self, other: Reading) -> Reading:
        """One after the other."""
        return Reading(self.seconds + other.seconds, max(self.memory, other.memory), self.disk + other.disk)


Devices = tuple[torch.device, torch.device]
"""The receiver's and the sharer's."""


def stored(pair: C2C, rows: Sequence[TrainRow], folder: Path, devices: Devices) -> Reading:
    """Of the features that are not in `folder` yet."""
    (sharer,), lacking = pair.sharers, missing(rows, pair, folder)
    own = _read(pair.receiver, lacking.own, devices[0])
    theirs = _read(sharer, [*map(heard_by, lacking.theirs)], devices[1])
    return own + theirs + Reading(disk=lacking.size)


def fetching(pair: C2C, rows: Sequence[TrainRow], folder: Path) -> float:
    """Seconds that reading one row's features from `folder` takes, measured on some of those that are there already; 0 if
    none is. They are read twice and the second time counts, when they are in the system's memory but not in the process's.
    """
    (sharer,), layers = pair.sharers, mapped(pair)
    taken = 0.0
    for _ in range(2):
        own = PrefillStore(folder, pair.receiver.card, pair.receiver.dtype)
        theirs = PrefillStore(folder, sharer.card, sharer.dtype)
        some = [
            row
            for row in rows[:: math.ceil(len(rows) / _FETCHED_ROWS)]
            if own.holds(row.row.ids[: row.first_stop]) and theirs.holds(heard_by(row), row.heard_at, layers)
        ]
        start = time.perf_counter()
        for row in some:
            own.load(row.row.ids[: row.first_stop]).clone()
            theirs.load(heard_by(row), row.heard_at, layers).clone()
        taken = (time.perf_counter() - start) / len(some) if some else 0.0
    return taken


def live(pair: C2C, batch: Batch, devices: Devices) -> Reading:
    """Of one batch whose prefills are computed when they are needed."""
    lengths = max(row.first_stop for row in batch), max(len(heard_by(row)) for row in batch)
    found = zip((pair.receiver, *pair.sharers), lengths, devices, strict=True)
    return sum((Reading(*prefill_cost(lm, len(batch), n, device)) for lm, n, device in found), Reading())


def teaching(pair: C2C, rows: Sequence[TrainRow], top: int, device: torch.device, folder: Path | None) -> Reading:
    """Of the sharer's distributions along the responses that are not in `folder` yet; of all if they are not kept.

    The sharer reads the responses too, and its output head takes as long for a token as layers with as many weights.

    Args:
        top: tokens of a distribution.
    """
    (sharer,) = pair.sharers
    if folder is not None:
        rows = untaught(rows, pair, folder, top)
    if not rows:
        return Reading()
    tokens = sum(len(row.response) for row in rows)
    read = [np.concatenate([heard_by(row), row.response]) for row in rows]
    reading = _read(sharer, read, device)
    layers = sum(weight.numel() for weight in layer_weights(sharer))
    head = head_weight(sharer).numel() / layers * tokens / sum(map(len, read))
    disk = 0.0 if folder is None else tokens * position_bytes(top)
    return Reading(reading.seconds * (1 + head), reading.memory, disk)


def _read(lm: LanguageModel, prompts: Sequence[Ids], device: torch.device) -> Reading:
    """Of prefills, trees of about equal length in a batch, as `PrefillStore.compute` makes them."""
    if not prompts:
        return Reading()
    together = trees.sees_all(lm, max(map(len, prompts)))
    found = trees.grow(prompts, [*map(row_key, prompts)]) if together else trees.alone(prompts)
    sequences = [range(tree.tokens) for tree in found]
    batches = list(by_length(sequences, default_batch_tokens(device)))
    padded = [len(batch) * len(sequences[batch[0]]) for batch in batches]
    middle = batches[int(np.searchsorted(np.cumsum(padded), sum(padded) / 2))]
    seconds, memory = prefill_cost(lm, len(middle), len(sequences[middle[0]]), device)
    return Reading(seconds * sum(padded) / (len(middle) * len(sequences[middle[0]])), memory)
