"""A shallow copy of a pair that does, with one batch, everything that training does."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from cache2cache.fuser.base import Fuser
from cache2cache.fuser.compact import CompactFuser
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.models.skeleton import shallow
from cache2cache.pipeline import C2C
from cache2cache.train.batch import Collator, Item, Teacher, TrainRow
from cache2cache.train.config import Recipe
from cache2cache.train.dropout import SharerDropout
from cache2cache.train.statistics import mapped, sample, sharer_statistics, standardise
from cache2cache.train.step import TrainingStep

Batch = dict[str, torch.Tensor]


class Miniature:
    """A pair with a receiver of a few layers, a fuser for it, and rows whose prefills are there.

    Args:
        pair: of skeletons, with its fuser on the meta device.
        layers: of the receiver.
    """

    def __init__(self, pair: C2C, recipe: Recipe, rows: Sequence[TrainRow], device: torch.device, layers: int):
        self._pair, self.device = _small(pair, layers, device), device
        self._items = [_item(row, self._pair, recipe) for row in rows]
        self._collate, self._step = Collator(self._pair), _step(self._pair, recipe)
        (self._fuser,) = self._pair.fusers
        self._trained = [parameter for parameter in self._fuser.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(self._trained)

    def batch(self) -> Batch:
        """The rows put together."""
        return self._put_together(self._items)

    @contextmanager
    def on_disk(self) -> Iterator[Callable[[], Batch]]:
        """A way to put the rows together from a file, as training does; the first touch of mapped memory takes time."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prefills.safetensors"
            sides = ("own", "theirs")
            save_file({f"{side}.{i}": getattr(x, side) for i, x in enumerate(self._items) for side in sides}, path)

            def read() -> Batch:
                with safe_open(path, framework="pt") as file:
                    found = [{side: file.get_tensor(f"{side}.{i}") for side in sides} for i in range(len(self._items))]
                return self._put_together([replace(x, **caches) for x, caches in zip(self._items, found, strict=True)])

            yield read

    def learn(self, batch: Batch) -> None:
        """One pass, forward and backward."""
        self._optimizer.zero_grad()
        self._step.train()(**batch)["loss"].backward()

    def update(self) -> None:
        """The optimizer's step, and what the trainer looks at before it."""
        for gradient in (p.grad for p in self._trained if p.grad is not None):
            bool(gradient.isfinite().all())
        torch.nn.utils.clip_grad_norm_(self._trained, 1.0)
        self._optimizer.step()

    @torch.no_grad()
    def judge(self, batch: Batch) -> None:
        """One pass of a validation."""
        self._step.eval()(**batch)

    def measure(self, times: int = 1) -> None:
        """Take statistics of the rows, each counted so many times."""
        found = sample(self._items * times, self._pair)
        if isinstance(self._fuser, CompactFuser):
            standardise(self._fuser, found)
        sharer_statistics(self._pair, found)

    def _put_together(self, items: Sequence[Item]) -> Batch:
        return {name: x.to(self.device) for name, x in self._collate(items).items() if isinstance(x, torch.Tensor)}


def _small(pair: C2C, layers: int, device: torch.device) -> C2C:
    """The pair with a receiver of the first few layers, that listen to what the last ones listen to.

    Where several of the receiver's layers share one of the sharer's, scaling up counts the sharer's layers too often.
    """
    (fuser,), (sharer,) = pair.fusers, pair.sharers
    receiver = shallow(pair.receiver, layers, device)
    changes = {"receiver": receiver.card, "layer_map": fuser.config.layer_map[-layers:]}
    with torch.random.fork_rng(devices=[]):
        return C2C(receiver, [sharer], [Fuser.from_config(fuser.config.model_copy(update=changes))])


def _step(pair: C2C, recipe: Recipe) -> TrainingStep:
    (sharer,), layers = pair.sharers, mapped(pair)
    geometry = sharer.card.geometry.only(layers)
    size = geometry.features
    covariance = torch.zeros((1, 1, 1, 1), dtype=torch.float64).expand(2, len(layers), size, size)
    mean = FeatureStatistics(geometry, torch.zeros((2, len(layers), size), dtype=torch.float64), covariance, 1)
    optim = recipe.optim
    return TrainingStep(
        pair,
        recipe.objective,
        precision=optim.precision,
        dropout=SharerDropout(optim.sharer_dropout, mean) if optim.sharer_dropout else None,
        mean=mean,
        checkpointing=optim.gradient_checkpointing,
    )


def _item(row: TrainRow, pair: C2C, recipe: Recipe) -> Item:
    """A row with caches and a teacher of the right sizes."""
    receiver, (sharer,) = pair.receiver, pair.sharers
    own, theirs = receiver.card.geometry, sharer.card.geometry
    teacher = None
    if recipe.objective.distill:
        shape = (len(row.response), recipe.objective.distill_top)
        teacher = Teacher(torch.zeros(shape, dtype=torch.long), torch.full(shape, -math.log(shape[1])))
    return Item(
        row,
        torch.zeros((2, own.layers, own.kv_heads, row.first_stop, own.head_dim), dtype=receiver.dtype),
        torch.zeros((2, len(mapped(pair)), theirs.kv_heads, len(row.heard), theirs.head_dim), dtype=sharer.dtype),
        teacher,
    )
