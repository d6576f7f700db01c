"""The published fuser: C2CProjector's arithmetic, all layers at once."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.layers import ResidualBlock, StackedLinear, heads, tokens


class PaperSizes(BaseModel):
    """Sizes of a paper fuser, under the published names."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    hidden_dim: int = Field(default=1024, gt=0)
    intermediate_dim: int = Field(default=1024, gt=0)
    """Inner width of the residual blocks, except the one before the weights: its is hidden_dim."""
    num_layers: int = Field(default=3, ge=2)
    """Residual blocks before the projection, plus 2."""
    dropout: float = Field(default=0.1, ge=0, lt=1)


class PaperFuser(Fuser):
    """Per entry, with separate weights::

        h   = trunk(W_in [sharer, receiver] + b_in)
        w   = sigmoid(W_weight block(h) + b_weight)        one per receiver head
        P   = W_out blocks(h) + b_out
        out = receiver + gate · w · P

    Keys are taken as they are in the cache, rotated by their positions. Source: arXiv 2510.03215.
    """

    Sizes = PaperSizes
    sizes: PaperSizes

    def __init__(self, config: FuserConfig):
        super().__init__(config)
        own, other, sizes = config.receiver.geometry, config.sharer.geometry, self.sizes
        layers, width = own.layers, sizes.hidden_dim

        def block(inner: int) -> ResidualBlock:
            return ResidualBlock(layers, width, inner, sizes.dropout)

        self.enter = StackedLinear(layers, other.features + own.features, width)
        self.trunk = block(sizes.intermediate_dim)
        self.weigh_block = block(sizes.hidden_dim)
        self.weigh = StackedLinear(layers, width, own.kv_heads)
        self.blocks = nn.ModuleList(block(sizes.intermediate_dim) for _ in range(sizes.num_layers - 2))
        self.leave = StackedLinear(layers, width, own.features)

    def project(self, own, other, own_positions, other_positions, entries, subset):
        batch, kv_heads = own.shape[1], own.shape[2]
        x = torch.cat([tokens(other), tokens(own)], dim=-1).to(self.dtype)
        h = self.trunk(self.enter(x, subset), subset)
        weight = heads(self.weigh(self.weigh_block(h, subset), subset).sigmoid(), batch, kv_heads)  # (E, B, H, P, 1)
        for block in self.blocks:
            h = block(h, subset)
        return weight, heads(self.leave(h, subset), batch, kv_heads)
