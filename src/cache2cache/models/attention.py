"""Attention for a backward pass behind a cache."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import eager_mask

_NAME = "cache2cache-few-queries"
_FEW = 32


@contextmanager
def few_queries(model: PreTrainedModel, queries: int) -> Iterator[None]:
    """While this lasts, a model on a CPU that reads a few tokens with gradients attends by plain matrix products.

    torch's fused attention is made for as many queries as keys. For 16 rows, 9 heads (3 of keys and values) and 92 positions
    in bfloat16 on one core, forward and backward of one layer took it 10.6 ms for 2 queries, plain products 0.7 ms. With many
    queries the times meet, and the weights that plain products keep, (B, H, queries, positions), grow.

    Args:
        queries: tokens per row.
    """
    usual = model.config._attn_implementation
    if model.device.type != "cpu" or queries > _FEW or usual != "sdpa":
        yield
        return
    model.set_attn_implementation(_NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(usual)


def plain_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor,
    dropout: float = 0.0,
    scaling: float | None = None,
    position_bias: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """What transformers' `sdpa_attention_forward` computes, without repeating keys and values for each query head.

    Args:
        query: (B, H, T, D); the heads that share a key follow one another.
        key, value: (B, H_kv, N, D)
        attention_mask: (B, 1, T, N), added to the scores.
    Returns:
        (B, T, H, D), and no weights.
    """
    if dropout or position_bias is not None:
        options = {"dropout": dropout, "scaling": scaling, "position_bias": position_bias}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options, **kwargs)  # type: ignore[arg-type]
    shape, grouped = query.shape, (key.shape[1], -1)  # (H_kv, heads that share one)
    scale = shape[-1] ** -0.5 if scaling is None else scaling
    scores = (query * scale).unflatten(1, grouped).flatten(2, 3) @ key.mT  # (B, H_kv, heads · T, N)
    scores = scores.unflatten(2, (-1, shape[2])) + attention_mask[:, :, None]
    weights = scores.softmax(-1, dtype=torch.float32).to(value.dtype)
    out = (weights.flatten(2, 3) @ value).view(shape)
    return out.transpose(1, 2).contiguous(), None


AttentionInterface.register(_NAME, plain_attention)
AttentionMaskInterface.register(_NAME, eager_mask)
