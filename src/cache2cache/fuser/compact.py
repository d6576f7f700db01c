"""The compact fuser: position-free keys, standardised inputs, a narrow trunk. A few MB instead of hundreds."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from cache2cache.errors import FuserMismatchError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.layers import ResidualBlock, StackedLinear, heads, pick, tokens
from cache2cache.fuser.rotary import Rotary


class CompactSizes(BaseModel):
    """Sizes of a compact fuser."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(default=128, gt=0)
    inner: int = Field(default=256, gt=0)
    """Inner width of a residual block."""
    blocks: int = Field(default=2, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)


class CompactFuser(Fuser):
    """Per entry, with separate weights::

        s, t = standardise(unrotate(sharer)), standardise(unrotate(receiver))
        h    = blocks(W_in [s, t] + b_in)
        w    = sigmoid(W_weight h + b_weight)              one per receiver head
        P    = rotate(std_receiver · (W_out h + b_out))
        out  = receiver + gate · w · P

    Values are not rotated. W_out and b_out begin at zero, so a fresh fuser changes nothing.
    """

    Sizes = CompactSizes
    sizes: CompactSizes
    own_mean: torch.Tensor
    own_std: torch.Tensor
    other_mean: torch.Tensor
    other_std: torch.Tensor

    def __init__(self, config: FuserConfig):
        super().__init__(config)
        own, other = config.receiver.geometry, config.sharer.geometry
        for side, card in (("receiver", config.receiver), ("sharer", config.sharer)):
            if card.geometry.rope_problem or not card.geometry.rope_of_layer:
                raise FuserMismatchError(
                    f"a compact fuser cannot rotate the keys of the {side} {card.id} back to position 0",
                    got=card.geometry.rope_problem or "no rotary parameters recorded",
                    hint='Train a fuser of kind "paper", which takes keys as they are',
                )
        layers, width = own.layers, self.sizes.width
        self.enter = StackedLinear(layers, other.features + own.features, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(layers, width, self.sizes.inner, self.sizes.dropout) for _ in range(self.sizes.blocks)
        )
        self.weigh = StackedLinear(layers, width, own.kv_heads)
        self.leave = StackedLinear(layers, width, own.features, zero=True)
        for name, size in (("own", own.features), ("other", other.features)):
            self.register_buffer(f"{name}_mean", torch.zeros(2, layers, 1, size))
            self.register_buffer(f"{name}_std", torch.ones(2, layers, 1, size))
        self._rotate_own = Rotary(own)
        self._rotate_other = Rotary(other, list(config.layer_map))

    def project(self, own, other, own_positions, other_positions, entries, subset):
        batch, kv_heads = own.shape[1], own.shape[2]
        own, other = self._still(own, other, own_positions, other_positions, entries)
        own_std = pick(self.own_std, subset)
        s = (tokens(other) - pick(self.other_mean, subset)) / pick(self.other_std, subset)
        t = (tokens(own) - pick(self.own_mean, subset)) / own_std
        h = self.enter(torch.cat([s, t], dim=-1), subset)
        for block in self.blocks:
            h = block(h, subset)
        weight = heads(self.weigh(h, subset).sigmoid(), batch, kv_heads)  # (E, B, H, P, 1)
        projection = heads(own_std * self.leave(h, subset), batch, kv_heads)
        return weight, self._on_keys(self._rotate_own, projection, own_positions, entries, back=False)

    @torch.no_grad()
    def standardise(
        self, own: torch.Tensor, other: torch.Tensor, own_positions: torch.Tensor, other_positions: torch.Tensor
    ) -> None:
        """Set the statistics of the pair from a sample of caches; shapes as in `delta`."""
        entries = torch.arange(own.shape[0] * own.shape[1], device=own.device)
        own, other = self._still(
            own.flatten(0, 1).float(), other.flatten(0, 1).float(), own_positions, other_positions, entries
        )
        for name, kv in (("own", own), ("other", other)):
            flat = tokens(kv)
            mean, std = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
            getattr(self, f"{name}_mean").copy_(mean.view_as(getattr(self, f"{name}_mean")))
            # A feature that never moves must not be blown up by dividing by almost nothing.
            floor = 1e-2 * std.mean(-1, keepdim=True) + 1e-6
            getattr(self, f"{name}_std").copy_(std.maximum(floor).view_as(getattr(self, f"{name}_std")))

    def _still(self, own, other, own_positions, other_positions, entries):
        """Both sides with their keys rotated back to position 0."""
        own = self._on_keys(self._rotate_own, own, own_positions, entries, back=True)
        other = self._on_keys(self._rotate_other, other, other_positions, entries, back=True)
        return own, other

    def _on_keys(self, rotary: Rotary, kv, positions, entries, *, back: bool):
        """Apply a rotation to the entries that are keys; those come first."""
        count = int((entries < self.config.receiver.geometry.layers).sum())
        return torch.cat([rotary(kv[:count], positions, entries[:count], back=back), kv[count:]])
