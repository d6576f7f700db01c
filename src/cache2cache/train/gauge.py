"""Measuring how long some work takes and how much memory its tensors need, on any device."""

from __future__ import annotations

import statistics
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_ENOUGH_SECONDS = 1.0


def seconds(work: Callable[[], object], device: torch.device) -> float:
    """Median time of some work, after a warm-up."""
    work()
    taken: list[float] = []
    while len(taken) < 2 or (sum(taken) < _ENOUGH_SECONDS and len(taken) < 15):
        _synchronise(device)
        start = time.perf_counter()
        work()
        _synchronise(device)
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)


def _synchronise(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def peak(work: Callable[[], object], device: torch.device) -> float:
    """Bytes of the tensors that some work makes, at the fullest moment."""
    if device.type != "cpu":
        before = torch.accelerator.memory_allocated(device)
        torch.accelerator.reset_peak_memory_stats(device)
        work()
        return float(torch.accelerator.max_memory_allocated(device) - before)
    with _Living() as living:
        work()
    return float(living.most)


class _Living(TorchDispatchMode):
    """Counts the bytes of tensors that were made inside and are still alive: torch keeps no such count on a CPU.

    What an operation uses for itself and gives back before it ends is not seen.
    """

    def __init__(self) -> None:
        super().__init__()
        self.most = self._now = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and x.untyped_storage()._cdata not in given | self._known:
                self._count(x.untyped_storage())
        return out

    def _count(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self._now += size
        self.most = max(self.most, self._now)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self._now -= size
