"""Cache sizes and rotary parameters of a model, from its config alone: no weights, no model class named."""

from __future__ import annotations

from typing import Any

import torch
from pydantic import ValidationError
from transformers import PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cache2cache.errors import ModelError
from cache2cache.types import Geometry, Rope

_STATIC_ROPES = ("linear", "yarn", "llama3", "proportional")
"""Kinds whose frequencies do not depend on the length of the prompt."""


def geometry(config: PretrainedConfig, name: str) -> Geometry:
    """Read a model's geometry.

    Raises:
        ModelError: it is not a decoder, its layers are of different sizes, or its config lacks a size or has one that cannot be.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ModelError(f"{name} is an encoder-decoder", allowed="decoder-only language models")
    text = config.get_text_config(decoder=True)
    sizes = {key: getattr(text, key, None) for key in ("num_hidden_layers", "num_attention_heads", "vocab_size")}
    missing = [key for key, value in sizes.items() if not value]
    if missing:
        raise ModelError(
            f"{name} has no per-token KV cache: its config has no {', '.join(missing)}",
            got=config.model_type,
            allowed="decoders with attention in every layer",
        )
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    head_dim = _of_all_layers(text, "head_dim", name) or text.hidden_size // heads
    ropes, of_layer, problem = _ropes(text, layers, head_dim)
    try:
        return Geometry(
            layers=layers,
            kv_heads=_of_all_layers(text, "num_key_value_heads", name) or heads,
            head_dim=head_dim,
            vocab_size=text.vocab_size,
            max_positions=getattr(text, "max_position_embeddings", None),
            ropes=ropes,
            rope_of_layer=of_layer,
            rope_problem=problem,
        )
    except ValidationError as error:
        faults = [f"{'.'.join(map(str, x['loc'])) or 'layers'} {x['input']}: {x['msg']}" for x in error.errors()]
        raise ModelError(f"no cache has the sizes that the config of {name} says", got="; ".join(faults)) from error


def _of_all_layers(text: Any, field: str, name: str) -> int | None:
    """A size that all layers share.

    Raises:
        ModelError: they do not, as in Gemma 4.
    """
    try:
        return getattr(text, field, None)
    except RuntimeError as error:  # transformers' for a field that is another one in each layer
        sizes = sorted({getattr(layer, field) for layer in text.per_layer_config})
        raise ModelError(
            f"the layers of {name} have caches of different sizes: {field} is not the same in all of them",
            got=", ".join(map(str, sizes)), allowed="one size for all layers",
        ) from error  # fmt: skip


def attention_window(config: Any) -> int | None:
    """Tokens that the layer with the shortest sight sees; None if all layers see everything."""
    text = config.get_text_config(decoder=True)
    types = getattr(text, "layer_types", None)
    if types is not None and set(types) <= {"full_attention"}:
        return None
    windows = (getattr(text, name, None) for name in ("sliding_window", "attention_chunk_size"))
    return min((window for window in windows if window), default=None)


def _ropes(config: Any, layers: int, head_dim: int) -> tuple[tuple[Rope, ...], tuple[int, ...], str | None]:
    parameters = getattr(config, "rope_parameters", None)
    if not parameters:
        return (), (), "its config has no rotary parameters (positions are learned or enter another way)"
    if "rope_type" in parameters:  # one kind for all layers
        by_type: dict[str | None, dict] = {None: parameters}
        types: list[str | None] = [None] * layers
    else:
        by_type = {t: p for t, p in parameters.items() if p}
        types = list(config.layer_types)
    if unknown := sorted({str(t) for t in types} - {str(t) for t in by_type}):
        return (), (), f"layers of type {', '.join(unknown)} have no rotary parameters"
    order = list(by_type)
    ropes = []
    for layer_type in order:
        rope = _rope(config, by_type[layer_type], layer_type, head_dim)
        if isinstance(rope, str):
            return (), (), rope
        ropes.append(rope)
    return tuple(ropes), tuple(order.index(t) for t in types), None


def _rope(config: Any, parameters: dict, layer_type: str | None, head_dim: int) -> Rope | str:
    kind = parameters["rope_type"]
    if kind == "default":
        dim = int(head_dim * parameters.get("partial_rotary_factor", 1.0))
        inv_freq = 1.0 / parameters["rope_theta"] ** (torch.arange(0, dim, 2, dtype=torch.float) / dim)
        return Rope(inv_freq=tuple(inv_freq.tolist()))
    if kind not in _STATIC_ROPES:
        return f"its {kind} rotary embedding changes with the length of the prompt"
    inv_freq, scaling = ROPE_INIT_FUNCTIONS[kind](config, torch.device("cpu"), layer_type=layer_type)
    return Rope(inv_freq=tuple(inv_freq.tolist()), scaling=float(scaling))
