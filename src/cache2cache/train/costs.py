"""What one batch costs on this machine, in time and memory.

A model's layers are alike, so a cost is a constant (embedding, output head) and a multiple of the depth. Both are measured,
with few layers and with more, on the code that trains: nothing here counts operations or knows processors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.models.skeleton import layer_weights, shallow
from cache2cache.pipeline import C2C
from cache2cache.train.batch import TrainRow
from cache2cache.train.config import Recipe
from cache2cache.train.gauge import peak, seconds
from cache2cache.train.miniature import Miniature

_ENOUGH_BYTES = 256e6
"""Weights of a shallow copy: more than a processor's caches hold, or it would be faster than the whole model."""


@dataclass(frozen=True)
class Seconds:
    """Of one batch whose prefills are there."""

    collate: float
    learn: float
    """Forward and backward."""
    update: float
    """The optimizer's step."""
    judge: float
    """The same rows in a validation, collating included."""
    measure: float
    """Taking statistics of them."""
    measure_twice: float
    """Of twice as many."""


@dataclass(frozen=True)
class Bytes:
    """Of one batch whose prefills are there: memory at the fullest moment, beyond models and fuser."""

    collate: float
    learn: float
    """With gradients and the optimizer's moments."""
    judge: float
    measure: float
    measure_twice: float


def prefill_cost(lm: LanguageModel, batch: int, tokens: int, device: torch.device) -> tuple[float, float]:
    """Of reading `batch` prompts of this many tokens: seconds, and bytes at the fullest moment, beyond the model."""

    def measured(layers: int) -> tuple[float, float]:
        model = shallow(lm, layers, device, vocabulary=False).model
        ids = torch.zeros((batch, tokens), dtype=torch.long, device=device)

        def read() -> None:
            kv.prefill(model, ids, torch.ones_like(ids))

        return seconds(read, device), peak(read, device)

    time, memory = _scaled(measured, lm.card.geometry.layers, depths(lm))
    return time, memory


def batch_seconds(pair: C2C, recipe: Recipe, rows: Sequence[TrainRow], device: torch.device) -> Seconds:
    """How long training on these rows takes.

    Args:
        pair: of skeletons, with its fuser on the meta device.
    """
    return Seconds(*_of_batch(pair, recipe, lambda layers: _seconds(Miniature(pair, recipe, rows, device, layers))))


def batch_bytes(pair: C2C, recipe: Recipe, rows: Sequence[TrainRow], device: torch.device) -> Bytes:
    """How much memory training on these rows needs; arguments as above."""
    return Bytes(*_of_batch(pair, recipe, lambda layers: _bytes(Miniature(pair, recipe, rows, device, layers))))


def _seconds(small: Miniature) -> tuple[float, ...]:
    with small.on_disk() as put_together:
        batch = put_together()
        work = (
            put_together,
            lambda: small.learn(batch),
            small.update,
            lambda: small.judge(put_together()),
            small.measure,
            lambda: small.measure(2),
        )
        return tuple(seconds(each, small.device) for each in work)


def _bytes(small: Miniature) -> tuple[float, ...]:
    def two_steps() -> None:
        for _ in range(2):  # the second meets the moments that the first has left
            small.learn(small.batch())
            small.update()

    work = (
        small.batch,
        two_steps,
        lambda: small.judge(small.batch()),
        small.measure,
        lambda: small.measure(2),
    )
    return tuple(peak(each, small.device) for each in work)


def _of_batch(pair: C2C, recipe: Recipe, measured: Callable[[int], tuple[float, ...]]) -> list[float]:
    layers = pair.receiver.card.geometry.layers
    # With gates that are open in chosen layers only, the first layers are not like the rest.
    return _scaled(measured, layers, depths(pair.receiver) if recipe.fuser.gate.layers is None else (layers, layers))


def depths(lm: LanguageModel) -> tuple[int, int]:
    """Numbers of layers to measure with: a few, the first layer being a little unlike the others, and as many as make a
    copy large enough."""
    layers = lm.card.geometry.layers
    inside = sum(weight.nbytes for weight in layer_weights(lm))
    return 2, min(layers, max(4, math.ceil(_ENOUGH_BYTES * layers / inside)))


def _scaled(measured: Callable[[int], tuple[float, ...]], layers: int, depths: tuple[int, int]) -> list[float]:
    """What is measured with so many layers, or would be."""
    few, many = depths
    if many == layers:
        return list(measured(layers))
    return [on_line(a, b, depths, layers) for a, b in zip(measured(few), measured(many), strict=True)]


def on_line(few: float, many: float, sizes: tuple[int, int], wanted: int) -> float:
    """The cost at the size that is wanted, on the line through the costs at two sizes."""
    return few + max(many - few, 0.0) * (wanted - sizes[0]) / (sizes[1] - sizes[0])
