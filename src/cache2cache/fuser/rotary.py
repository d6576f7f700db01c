"""Rotating keys to and from their positions, with a model's own rotary parameters."""

from __future__ import annotations

import torch

from cache2cache.types import Geometry


class Rotary:
    """Rotates a model's keys; layers may have different rotary embeddings.

    The pairing is half-split (dim i with dim i + rotated / 2), the one that transformers' Llama-like models use.
    """

    def __init__(self, geometry: Geometry, layers: list[int] | None = None):
        """`layers`: which layer each entry belongs to; all layers in order by default."""
        layers = list(range(geometry.layers)) if layers is None else layers
        self._kinds = torch.tensor([geometry.rope_of_layer[layer] for layer in layers], device="cpu")
        self._ropes = geometry.ropes

    def __call__(
        self, keys: torch.Tensor, positions: torch.Tensor, entries: torch.Tensor, *, back: bool
    ) -> torch.Tensor:
        """Rotate by `positions`, or back to position 0.

        Args:
            keys: (E, B, H, P, D)
            positions: (B, P)
            entries: (E,) which of the layers given at construction each entry is.
        """
        kinds = self._kinds[entries.cpu()]
        if len(self._ropes) == 1:
            return self._rotate(keys, positions, 0, back)
        out = torch.empty_like(keys)
        for kind in kinds.unique().tolist():
            chosen = (kinds == kind).to(keys.device)
            out[chosen] = self._rotate(keys[chosen], positions, kind, back)
        return out

    def _rotate(self, keys: torch.Tensor, positions: torch.Tensor, kind: int, back: bool) -> torch.Tensor:
        rope = self._ropes[kind]
        half = len(rope.inv_freq)
        inv_freq = torch.tensor(rope.inv_freq, device=keys.device, dtype=torch.float32)
        angle = positions[:, None, :, None].float() * inv_freq  # (B, 1, P, half)
        scale = 1 / rope.scaling if back else rope.scaling
        cos, sin = angle.cos() * scale, angle.sin() * (-scale if back else scale)
        a, b, rest = keys[..., :half].float(), keys[..., half : 2 * half].float(), keys[..., 2 * half :]
        turned = (a * cos).sub_(b * sin), (b * cos).add_(a * sin)
        return torch.cat([*(x.to(keys.dtype) for x in turned), rest], dim=-1)
