"""The compact fuser: position-free keys, standardised inputs, a narrow trunk. A few MB instead of hundreds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import nn

from cache2cache.errors import FuserMismatchError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.layers import ResidualBlock, StackedLinear, heads, pick
from cache2cache.fuser.rotary import Rotary
from cache2cache.types import ModelCard

_Side = tuple[torch.Tensor, torch.Tensor, Rotary | None]
"""One side's cache (E, B, H, P, D), its position ids (B, P), and what rotates its keys."""


class CompactSizes(BaseModel):
    """Sizes and parts of a compact fuser. The parts are there to be left out, one at a time, in ablations."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    width: int = Field(default=128, gt=0)
    inner: int = Field(default=256, gt=0)
    """Inner width of a residual block."""
    blocks: int = Field(default=2, ge=0)
    dropout: float = Field(default=0.0, ge=0, lt=1)
    still_keys: bool = True
    """Whether keys are rotated back to position 0 first. If not they are taken as they are in the cache."""
    weigh: bool = True
    """Whether the projection is weighted by the input; otherwise the weight is 1."""
    combine: Literal["add", "replace"] = "add"
    """add: the projection is added to the receiver's cache. replace: it takes the cache's place, as far as it is weighted."""
    hear_own: bool = True
    """Whether the receiver's cache is an input beside the sharer's."""


class CompactFuser(Fuser):
    """Per entry, with separate weights::

        s, t = standardise(unrotate(sharer)), standardise(unrotate(receiver))
        h    = blocks(W_in [s, t] + b_in)
        w    = sigmoid(W_weight h + b_weight)              one per receiver head
        P    = rotate(std_receiver · (W_out h + b_out))
        out  = receiver + gate · w · P

    Values are not rotated. W_out and b_out begin at zero, so a fresh fuser changes nothing.

    With `combine = "replace"`::

        P    = rotate(mean_receiver + std_receiver · (W_out h + b_out))
        out  = receiver + gate · w · (P − receiver)

    and a fresh fuser moves the cache towards its mean.
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
        layers, width = own.layers, self.sizes.width
        self.enter = StackedLinear(layers, other.features + own.features * self.sizes.hear_own, width)
        self.blocks = nn.ModuleList(
            ResidualBlock(layers, width, self.sizes.inner, self.sizes.dropout) for _ in range(self.sizes.blocks)
        )
        self.weigh = StackedLinear(layers, width, own.kv_heads) if self.sizes.weigh else None
        self.leave = StackedLinear(layers, width, own.features, zero=True)
        for name, size in (("own", own.features), ("other", other.features)):
            self.register_buffer(f"{name}_mean", torch.zeros(2, layers, 1, size))
            self.register_buffer(f"{name}_std", torch.ones(2, layers, 1, size))
        self._rotate_own = self._rotate_other = None
        if self.sizes.still_keys:
            for side, card in (("receiver", config.receiver), ("sharer", config.sharer)):
                _check_ropes(side, card)
            self._rotate_own, self._rotate_other = Rotary(own), Rotary(other, list(config.layer_map))

    def project(self, own, other, own_positions, other_positions, entries, subset):
        batch, kv_heads = own.shape[1], own.shape[2]
        own_mean, own_std = pick(self.own_mean, subset), pick(self.own_std, subset)
        sides: list[_Side] = [(other, other_positions, self._rotate_other)]
        mean, std = pick(self.other_mean, subset), pick(self.other_std, subset)
        if self.sizes.hear_own:
            sides.append((own, own_positions, self._rotate_own))
            mean, std = torch.cat([mean, own_mean], dim=-1), torch.cat([std, own_std], dim=-1)
        # In place, since these are by far the largest tensors here and a pass over new memory costs as much as a product.
        h = self.enter(self._features(sides, entries, self.dtype).sub_(mean).div_(std), subset)
        for block in self.blocks:
            h = block(h, subset)
        shift = own_std * self.leave(h, subset)
        if self.sizes.combine == "replace":
            shift = shift + own_mean
        projection = self._rotated(heads(shift, batch, kv_heads), own_positions, entries)
        if self.sizes.combine == "replace":
            projection = projection.float() - own.float()
        if self.weigh is None:
            return projection.new_ones(()), projection
        return heads(self.weigh(h, subset).sigmoid(), batch, kv_heads), projection

    @torch.no_grad()
    def standardise(
        self, own: torch.Tensor, other: torch.Tensor, own_positions: torch.Tensor, other_positions: torch.Tensor
    ) -> None:
        """Set the statistics of the pair from a sample of caches; shapes as in `delta`."""
        entries = torch.arange(own.shape[0] * own.shape[1], device=own.device)
        for name, side in (
            ("own", (pick(own, None), own_positions, self._rotate_own)),
            ("other", (pick(other, None), other_positions, self._rotate_other)),
        ):
            flat = self._features([side], entries, torch.float32)
            mean, std = flat.mean(1, keepdim=True), flat.std(1, keepdim=True)
            getattr(self, f"{name}_mean").copy_(mean.view_as(getattr(self, f"{name}_mean")))
            # A feature that never moves must not be blown up by dividing by almost nothing.
            floor = 1e-2 * std.mean(-1, keepdim=True) + 1e-6
            getattr(self, f"{name}_std").copy_(std.maximum(floor).view_as(getattr(self, f"{name}_std")))

    def _features(self, sides: Sequence[_Side], entries: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """(E, B · P, F): the heads of all sides joined, keys rotated back to position 0."""
        cache = sides[0][0]
        keys = self._keys(entries)
        widths = [kv.shape[2] * kv.shape[4] for kv, *_ in sides]
        out = cache.new_empty((*cache.shape[:2], cache.shape[3], sum(widths)), dtype=dtype)  # (E, B, P, F)
        start = 0
        for (kv, positions, rotary), width in zip(sides, widths, strict=True):
            part = out[..., start : start + width].unflatten(-1, (kv.shape[2], kv.shape[4])).transpose(2, 3)
            if rotary is None:
                part.copy_(kv)
            else:
                part[:keys].copy_(rotary(kv[:keys].to(dtype), positions, entries[:keys], back=True))
                part[keys:].copy_(kv[keys:])
            start += width
        return out.flatten(1, 2)

    def _rotated(self, projection: torch.Tensor, positions: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
        """The projection (E, B, H, P, D) with its keys rotated to their positions."""
        if self._rotate_own is None:
            return projection
        keys = self._keys(entries)
        turned = self._rotate_own(projection[:keys], positions, entries[:keys], back=False)
        return torch.cat([turned, projection[keys:]])

    def _keys(self, entries: torch.Tensor) -> int:
        """How many of the entries are keys; those come first."""
        return int((entries < self.config.receiver.geometry.layers).sum())


def _check_ropes(side: str, card: ModelCard) -> None:
    if card.geometry.rope_problem or not card.geometry.rope_of_layer:
        raise FuserMismatchError(
            f"a compact fuser cannot rotate the keys of the {side} {card.id} back to position 0",
            got=card.geometry.rope_problem or "no rotary parameters recorded",
            hint='Train a fuser of kind "paper", or one with sizes.still_keys = false: they take keys as they are',
        )
