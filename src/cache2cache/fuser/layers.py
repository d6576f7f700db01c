"""Layers whose weights are stacked over (keys | values) × receiver layers and run as one batched product.

An *entry* is one kind and layer: entry e = kind · L_r + layer, kind 0 for keys, 1 for values.
"""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.nn import functional


class StackedLinear(nn.Module):
    """One linear map per entry; weight (2, L, in, out)."""

    def __init__(self, layers: int, n_in: int, n_out: int, *, bias: bool = True, zero: bool = False):
        super().__init__()
        bound = 0.0 if zero else 1 / math.sqrt(n_in)
        self.weight = nn.Parameter(torch.empty(2, layers, n_in, n_out).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(2, layers, 1, n_out).uniform_(-bound, bound)) if bias else None

    def forward(self, x: torch.Tensor, entries: torch.Tensor | None) -> torch.Tensor:
        """(E, T, in) → (E, T, out); `entries` says which maps these are, None means all."""
        weight = pick(self.weight, entries)
        if self.bias is None:
            return torch.bmm(x, weight)
        return torch.baddbmm(pick(self.bias, entries), x, weight)


class ResidualBlock(nn.Module):
    """h + dropout(W2 · gelu(W1 · (rmsnorm(h) · g))), exact GELU, no biases."""

    eps = 1e-6

    def __init__(self, layers: int, width: int, inner: int, dropout: float):
        super().__init__()
        self.norm = nn.Parameter(torch.ones(2, layers, 1, width))
        self.w1 = StackedLinear(layers, width, inner, bias=False)
        self.w2 = StackedLinear(layers, inner, width, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, h: torch.Tensor, entries: torch.Tensor | None) -> torch.Tensor:
        """(E, T, width) → the same."""
        # Norm and scale in float32, rounded once: in bfloat16 this is what the published fusers were trained with.
        normed = functional.rms_norm(h.float(), h.shape[-1:], eps=self.eps) * pick(self.norm, entries).float()
        return h + self.dropout(self.w2(functional.gelu(self.w1(normed.to(h.dtype), entries)), entries))


def pick(stacked: torch.Tensor, entries: torch.Tensor | None) -> torch.Tensor:
    """(2, L, …) → (E, …) of the chosen entries, all of them without a copy."""
    flat = stacked.flatten(0, 1)
    return flat if entries is None else flat[entries]


def tokens(kv: torch.Tensor) -> torch.Tensor:
    """(E, B, H, P, D) → (E, B · P, H · D): heads behind tokens and joined."""
    return kv.transpose(2, 3).flatten(3).flatten(1, 2)


def heads(flat: torch.Tensor, batch: int, count: int) -> torch.Tensor:
    """(E, B · P, H · D) → (E, B, H, P, D), the inverse of `tokens`."""
    return flat.unflatten(1, (batch, -1)).unflatten(3, (count, -1)).transpose(2, 3)
