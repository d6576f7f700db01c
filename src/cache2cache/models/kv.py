"""The only file that touches transformers' cache classes.

A cache here is always a `DynamicCache` built without a config, so that every layer keeps every position:
a cache that transformers builds for a model with sliding-window layers would forget the older ones, and a
fuser needs them all. Attention stays right, since the window is enforced by the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DynamicLayer

from cache2cache.errors import ModelError


def new_cache() -> DynamicCache:
    """An empty cache that keeps every position of every layer."""
    return DynamicCache()


def length(cache: DynamicCache) -> int:
    """Number of positions held."""
    return cache.get_seq_length()


def position_ids(mask: torch.Tensor) -> torch.Tensor:
    """Positions (B, N) of a padded batch, counted from each row's first real token; padding gets 0.

    Args:
        mask: (B, N), 1 for real tokens.
    """
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def prefill(
    model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache | None = None
) -> DynamicCache:
    """Read tokens into a cache, without computing any logits.

    Args:
        ids: (B, n) the new tokens.
        mask: (B, past + n), 1 for real tokens, over the cached positions and the new ones.
        cache: what was read before; extended in place. A new one by default.
    Returns:
        The cache, with past + n positions.
    """
    cache = new_cache() if cache is None else cache
    extend(model, ids, mask, cache)
    return cache


@torch.no_grad()
def prefill_masked(
    model: PreTrainedModel, ids: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor
) -> DynamicCache:
    """As `prefill` of a new cache, where each token stands at a position and sees what the mask lets it.

    Args:
        ids: (B, n) tokens.
        positions: (B, n)
        mask: (B, 1, n, n), added to the scores of attention.
    """
    cache = new_cache()
    model.get_decoder()(
        input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache, use_cache=True
    )
    return cache


def extend(model: PreTrainedModel, ids: torch.Tensor, mask: torch.Tensor, cache: DynamicCache) -> None:
    """As `prefill`, with gradients towards what the cache holds wherever they are enabled."""
    if ids.shape[1] == 0:
        return
    # The decoder without its output head: on a small model with a large vocabulary the head is much of the work.
    model.get_decoder()(
        input_ids=ids,
        attention_mask=mask,
        position_ids=position_ids(mask)[:, -ids.shape[1] :],
        past_key_values=cache,
        use_cache=True,
    )


def gather(
    cache: DynamicCache,
    positions: torch.Tensor,
    layers: Sequence[int] | None = None,
    rows: Sequence[int] | None = None,
) -> torch.Tensor:
    """Keys and values at chosen positions.

    Args:
        positions: (R, P) cache positions.
        layers: which layers, in which order; a layer may be named more than once. All by default.
        rows: the R rows of the batch that they are of; a row may be named more than once. All by default.
    Returns:
        (2, len(layers), R, H, P, D)
    """
    chosen = range(len(cache.layers)) if layers is None else layers
    of = torch.as_tensor(range(len(positions)) if rows is None else rows, device=positions.device)[:, None]
    read = {i: _at(cache.layers[i], of, positions) for i in set(chosen)}
    return torch.stack([torch.stack([read[i][x] for i in chosen]) for x in (0, 1)])


def _at(layer, rows: torch.Tensor, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    # (B, H, N, D) -> (B, P, H, D) -> (B, H, P, D)
    return tuple(x.transpose(1, 2)[rows, positions].transpose(1, 2) for x in (layer.keys, layer.values))  # type: ignore[return-value]


def scatter(cache: DynamicCache, positions: torch.Tensor, mask: torch.Tensor, kv: torch.Tensor) -> None:
    """Write keys and values at chosen positions, out of place, so that gradients flow and views stay whole.

    Args:
        positions: (B, P) cache positions.
        mask: (B, P) bool; only where it is true anything is written.
        kv: (2, L, B, H, P, D)
    """
    rows, cols = mask.nonzero(as_tuple=True)
    at = positions[rows, cols]
    for i, layer in enumerate(cache.layers):
        for x, name in enumerate(("keys", "values")):
            old = getattr(layer, name)
            new = kv[x, i].transpose(1, 2)[rows, cols].to(old.dtype)
            setattr(layer, name, old.transpose(1, 2).index_put((rows, at), new).transpose(1, 2))


def columns(cache: DynamicCache, start: int) -> torch.Tensor:
    """Keys and values of all positions from `start` on, (2, L, B, H, length − start, D)."""
    return torch.stack([torch.stack([x[..., start:, :] for x in side]) for side in zip(*_held(cache), strict=True)])


def replace_columns(cache: DynamicCache, start: int, kv: torch.Tensor) -> None:
    """Write keys and values in place of all positions from `start` on, or behind all of them, out of place, so that gradients
    flow.

    Args:
        kv: (2, L, B, H, P, D); the cache has start + P positions afterwards.
    """
    # One unbind each, whose backward pass is one stack; that of an index is a tensor of zeros as large as all layers.
    for i, (old, new) in enumerate(
        zip(_held(cache), zip(*(side.unbind() for side in kv.unbind()), strict=True), strict=True)
    ):
        cache.layers[i] = _layer(*(torch.cat([x[..., :start, :], y], dim=-2) for x, y in zip(old, new, strict=True)))


def clone(cache: DynamicCache) -> DynamicCache:
    """A cache that can be extended without changing the original. Tensors are shared: nothing writes into them."""
    return from_tensors(_held(cache))


def from_tensors(layers: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> DynamicCache:
    """A cache that holds the given (B, H, N, D) keys and values, one pair per layer. They are not copied."""
    cache = new_cache()
    cache.layers.extend(_layer(keys, values) for keys, values in layers)
    return cache


def lone_layer(cache: DynamicCache, layer: int) -> DynamicCache:
    """A cache that holds what another one holds of one layer and nothing of the others. Tensors are shared."""
    alone = new_cache()
    alone.layers.extend(DynamicLayer() for _ in range(layer + 1))
    if len(cache.layers) > layer and cache.layers[layer].keys is not None:  # type: ignore[union-attr]
        alone.layers[layer] = _layer(*layer_tensors(cache, layer))
    return alone


def adopt_layer(cache: DynamicCache, layer: int, keys: torch.Tensor, values: torch.Tensor) -> None:
    """Let a layer hold these (B, H, N, D) keys and values; the layers before it hold theirs already."""
    cache.layers[layer:] = [_layer(keys, values), *cache.layers[layer + 1 :]]


def layer_tensors(cache: DynamicCache, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (B, H, N, D) of one layer."""
    held = cache.layers[layer]
    return held.keys, held.values  # type: ignore[return-value]


def _layer(keys: torch.Tensor, values: torch.Tensor) -> DynamicLayer:
    layer = DynamicLayer()
    layer.dtype, layer.device = keys.dtype, keys.device
    layer.keys, layer.values, layer.is_initialized = keys, values, True
    return layer


def stack(cache: DynamicCache) -> torch.Tensor:
    """All keys and values as one tensor (2, L, B, H, N, D)."""
    return torch.stack([torch.stack(side) for side in zip(*_held(cache), strict=True)])


def device(cache: DynamicCache) -> torch.device:
    """Where the cache lies."""
    return _held(cache)[0][0].device


def _held(cache: DynamicCache) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Keys and values of every layer. transformers' types allow layers without any; `check` has ruled those out."""
    return [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[union-attr, misc]


def truncate(cache: DynamicCache, size: int) -> None:
    """Keep the first `size` positions."""
    for layer, (keys, values) in zip(cache.layers, _held(cache), strict=True):
        layer.keys, layer.values = keys[..., :size, :], values[..., :size, :]  # type: ignore[union-attr]


def repeated(cache: DynamicCache, times: int) -> DynamicCache:
    """Each row several times, as beam search and num_return_sequences need it before they begin; itself for once."""
    if times > 1:
        cache = clone(cache)
        cache.batch_repeat_interleave(times)
    return cache


def select_rows(cache: DynamicCache, rows: Sequence[int]) -> None:
    """Keep only these rows of the batch, in this order, in place."""
    cache.batch_select_indices(torch.tensor(rows, device=device(cache)))


def heads(cache: object) -> int | None:
    """KV heads of the first layer; None if it holds no keys. `check` compares the other layers with it."""
    first = next(iter(getattr(cache, "layers", None) or ()), None)
    keys = getattr(first, "keys", None)
    return None if keys is None else keys.shape[1]


def check(cache: object, layers: int, heads: int, head_dim: int, seen: int, name: str) -> None:
    """Raise ModelError unless the cache holds one (B, heads, seen, head_dim) key and value per layer.

    Models that compress their cache (MLA), keep a recurrent state (Mamba, RWKV) or share keys between layers
    have no per-token KV cache for a fuser to read or write.
    """
    needs = f"{layers} layers of keys and values (batch, {heads}, {seen}, {head_dim})"
    hint = "Use a decoder with ordinary multi-head or grouped-query attention, such as Llama, Qwen, Mistral, Gemma"
    held = getattr(cache, "layers", None)
    if held is None or len(held) != layers or not all(isinstance(layer, DynamicLayer) for layer in held):
        kind = (
            type(cache).__name__
            if held is None
            else f"{len(held)} layers of {sorted({type(x).__name__ for x in held})}"
        )
        raise ModelError(f"{name} has no per-token KV cache", got=kind, allowed=needs, hint=hint)
    for i, layer in enumerate(held):
        for x in (layer.keys, layer.values):
            if x is None or tuple(x.shape[1:]) != (heads, seen, head_dim):
                got = "nothing" if x is None else tuple(x.shape)
                raise ModelError(f"{name} has no per-token KV cache (layer {i})", got=got, allowed=needs, hint=hint)
