"""How fast this machine multiplies matrices, which is most of what models do."""

from __future__ import annotations

import time

import torch


def products_per_second(dtype: torch.dtype, device: torch.device, size: int = 2048) -> float:
    """Operations per second, two for each multiplication, of the fastest of several products of large matrices.

    Args:
        size: rows and columns of each.
    """
    a, b = torch.randn((2, size, size), device=device, dtype=dtype)
    best = float("inf")
    for _ in range(8):
        start = time.perf_counter()
        torch.mm(a, b)
        if device.type != "cpu":
            torch.accelerator.synchronize()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best
