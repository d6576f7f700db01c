"""Logits where they are wanted: the output head is much of the work of a small model with a large vocabulary."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from cache2cache.errors import ModelError
from cache2cache.models import kv


def logits_at(
    model: PreTrainedModel,
    ids: torch.Tensor,
    mask: torch.Tensor,
    cache: DynamicCache,
    wanted: torch.Tensor,
    positions: torch.Tensor | None = None,
) -> torch.Tensor:
    """Read tokens behind a cache, which is extended by them, and compute logits at some of them.

    Args:
        ids: (B, n) the new tokens.
        mask: (B, past + n), 1 for real tokens, over the cached positions and the new ones; or (B, 1, n, past + n), added to
            the scores of attention.
        wanted: (B, n) bool.
        positions: (B, n), by default counted along the mask.
    Returns:
        (K, V), the wanted positions row after row.

    Raises:
        ModelError: the model has no output head.
    """
    head = model.get_output_embeddings()
    if head is None:
        raise ModelError(f"{type(model).__name__} has no output head", allowed="language models that predict tokens")

    def pick(_: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        return (args[0][wanted][None],)

    # In front of the head rather than instead of it: whatever the model does to its logits afterwards (Gemma caps them,
    # Granite scales them), it does to these.
    hook = head.register_forward_pre_hook(pick)
    try:
        return model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=kv.position_ids(mask)[:, -ids.shape[1] :] if positions is None else positions,
            past_key_values=cache,
            use_cache=True,
        ).logits[0]
    finally:
        hook.remove()
