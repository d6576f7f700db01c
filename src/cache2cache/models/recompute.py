"""Gradient checkpointing of a model that reads behind a cache.

transformers' own switch needs a model in training mode, and takes the cache away from its layers: a second run of a layer
in the backward pass would append to the cache once more. Here each run appends to a cache of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import DynamicCache, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from cache2cache.errors import ModelError
from cache2cache.models import kv


@contextmanager
def recomputed(model: PreTrainedModel) -> Iterator[None]:
    """While this lasts, a layer of the model keeps nothing for the backward pass but its input; there it runs once more.

    The cache that is handed to the model holds the new positions afterwards, as always.

    Raises:
        ModelError: the model does not say which of its modules are layers that can be run again.
    """
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    if not layers:
        raise ModelError(
            f"{type(model).__name__} has no layers that can be computed again",
            allowed="models of transformers that support gradient checkpointing",
            hint="Train without gradient_checkpointing",
        )
    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer in layers:
            layer.forward = _again(layer.forward, _index(layer))
        yield
    finally:
        for layer, forward in zip(layers, before, strict=True):
            if forward is None:
                vars(layer).pop("forward", None)
            else:
                layer.forward = forward


def _again(forward: Callable[..., Any], index: int) -> Callable[..., Any]:
    """A layer's forward that runs once more in the backward pass. It writes to the cache's layer `index` only."""

    def run(*args: Any, **kwargs: Any) -> tuple[Any, torch.Tensor, torch.Tensor]:
        alone = None

        def own(x: Any) -> Any:
            nonlocal alone
            if isinstance(x, DynamicCache):
                alone = x = kv.lone_layer(x, index)
            return x

        out = forward(*map(own, args), **{name: own(x) for name, x in kwargs.items()})
        assert alone is not None, "the layer was given a cache"
        return out, *kv.layer_tensors(alone, index)

    def forward_again(*args: Any, **kwargs: Any) -> Any:
        (cache,) = (x for x in (*args, *kwargs.values()) if isinstance(x, DynamicCache))
        # Of the cache, only this layer: whatever a checkpoint is given lives until the backward pass.
        before = kv.lone_layer(cache, index)
        args = tuple(before if x is cache else x for x in args)
        kwargs = {name: before if x is cache else x for name, x in kwargs.items()}
        out, keys, values = checkpoint(run, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)  # type: ignore[misc]
        kv.adopt_layer(cache, index, keys, values)
        return out

    return forward_again


def _index(layer: nn.Module) -> int:
    """Which layer of the cache it writes to: transformers' attention modules carry it."""
    return next(int(module.layer_idx) for module in layer.modules() if hasattr(module, "layer_idx"))  # type: ignore[arg-type]
