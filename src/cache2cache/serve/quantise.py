"""Caches in 8 and 4 bits: symmetric, one float32 scale per (kind, layer, head, channel) over all positions.

With n = 127 (int8) or 7 (int4) levels on each side, scale = max |x| / n and code = round(x / scale), so that an error is at
most half a scale, besides the rounding of the dtype that the cache comes back in.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch.nn.functional import pad

Integer = Literal["int8", "int4"]

_LEVELS: dict[Integer, int] = {"int8": 127, "int4": 7}
_CODE_DTYPE: dict[Integer, torch.dtype] = {"int8": torch.int8, "int4": torch.uint8}


def layout(kv_shape: tuple[int, ...], kind: Integer) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape of the codes, as `kv`, and of the scales of a (2, U, H, P, D) cache.

    int4 packs two channels into a byte, the even one into the low half.
    """
    two, layers, heads, positions, channels = kv_shape
    width = channels if kind == "int8" else (channels + 1) // 2
    return {
        "kv": (_CODE_DTYPE[kind], (two, layers, heads, positions, width)),
        "scales": (torch.float32, (two, layers, heads, channels)),
    }


def quantise(kv: torch.Tensor, kind: Integer) -> dict[str, torch.Tensor]:
    """Codes, as `kv`, and scales, with the layout above.

    Args:
        kv: (2, U, H, P, D), finite, any float dtype; the arithmetic is in float32.
    """
    shapes = layout(tuple(kv.shape), kind)
    codes, scales = (torch.empty(shapes[name][1], dtype=shapes[name][0]) for name in ("kv", "scales"))
    for layer in range(kv.shape[1]):  # one at a time, so that float32 copies stay small
        x = kv[:, layer].float()  # (2, H, P, D)
        # A channel of zeros, or of numbers too small to divide by, still needs a scale that can be divided by.
        scale = (x.abs().amax(2) / _LEVELS[kind]).clamp(min=torch.finfo(torch.float32).tiny)
        code = (x / scale[:, :, None]).round().to(torch.int8)
        codes[:, layer], scales[:, layer] = _packed(code) if kind == "int4" else code, scale
    return {"kv": codes, "scales": scales}


def dequantise(tensors: dict[str, torch.Tensor], kind: Integer, dtype: torch.dtype) -> torch.Tensor:
    """The cache (2, U, H, P, D) in a float dtype, from what `quantise` returned."""
    codes, scales = tensors["kv"], tensors["scales"]
    kv = torch.empty((*codes.shape[:-1], scales.shape[-1]), dtype=dtype)
    for layer in range(codes.shape[1]):
        code = codes[:, layer]
        code = _unpacked(code, scales.shape[-1]) if kind == "int4" else code
        kv[:, layer] = code.float() * scales[:, layer, :, None]
    return kv


def _packed(code: torch.Tensor) -> torch.Tensor:
    """(..., D) int8 in -8..7 → (..., ceil(D / 2)) uint8."""
    halves = pad(code, (0, code.shape[-1] % 2)).view(torch.uint8) & 15
    return halves[..., 0::2] | halves[..., 1::2] << 4


def _unpacked(packed: torch.Tensor, channels: int) -> torch.Tensor:
    """(..., ceil(D / 2)) uint8 → (..., D) int8 in -8..7."""
    halves = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)[..., :channels]
    # Two's complement of four bits: 8..15 are -8..-1.
    return (halves ^ 8).to(torch.int8) - 8
