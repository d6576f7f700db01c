"""Prefills shared by the systems: what a model has read of a row is computed once and used by all that need it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from cache2cache.inputs import Row
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.models.parts import Ids
from cache2cache.models.prefills import PrefillStore, left_padded, prefill_rows, row_key
from cache2cache.pipeline import C2C, Prefill
from cache2cache.types import Timings, clock

Heard = Callable[[int, Sequence[Row], Timings], list[torch.Tensor]]
"""(sharer, rows, timings) → what is fused as that sharer's cache of each row, (2, L, H, M, D)."""


class Prefills:
    """The prefills of one batch of rows, kept until `clear`, or for good in a folder.

    Args:
        folder: of `PrefillStore`s, which may be shared with training runs; None keeps the current batch in memory only.
            May be set to None later, to measure what prefills take.
    """

    def __init__(self, folder: Path | None = None):
        self.folder = folder
        self._held: dict[tuple[int, str], torch.Tensor] = {}
        self._stores: dict[int, PrefillStore] = {}

    def open(self, models: Sequence[LanguageModel]) -> None:
        """Raise DataError now, not when the first row is asked, if the folder cannot be used for these models."""
        for lm in models:
            self._store(lm)

    def clear(self) -> None:
        """Forget what is in memory."""
        self._held.clear()

    def caches(self, lm: LanguageModel, prompts: Sequence[Ids], timings: Timings, stage: str) -> list[torch.Tensor]:
        """The cache of each prompt, (2, L, H, n, D), on the CPU. Those that are missing are computed as one batch."""
        keys = [(id(lm), row_key(ids)) for ids in prompts]
        store = self._store(lm)
        missing = {}
        for key, ids in zip(keys, prompts, strict=True):
            if key not in self._held and key not in missing:
                if store is not None and store.holds(ids):
                    self._held[key] = store.load(ids)
                else:
                    missing[key] = ids
        if missing:
            with clock(timings, stage, lm.device):
                computed = prefill_rows(lm, list(missing.values()))
            self._held |= zip(missing, computed, strict=True)
            if store is not None:
                store.add({key[1]: cache for key, cache in zip(missing, computed, strict=True)})
        return [self._held[key] for key in keys]

    def alone(self, pair: C2C, rows: Sequence[Row], timings: Timings, *, whole: bool) -> Prefill:
        """What `pair.read` gives where no sharer speaks.

        Args:
            whole: read the prompts to their end and leave the last position out afterwards: for a sharer, whose
                whole prompts the fused systems need as well.
        """
        lm = pair.receiver
        prompts = [row.ids if whole else row.ids[:-1] for row in rows]
        read = self.caches(lm, prompts, timings, "sharer_prefill" if whole else "receiver_prefill")
        caches = [cache[:, :, :, :-1] for cache in read] if whole else read
        return Prefill(pair.collate(rows), _batched(caches, lm), [], timings)

    def fused(self, pair: C2C, rows: Sequence[Row], heard: Heard, timings: Timings) -> Prefill:
        """What `pair.read` gives, with the sharers' caches from `heard`."""
        prepared = pair.collate(rows)
        theirs = [
            kv.new_cache() if part is None else _batched(heard(i, rows, timings), lm)
            for i, (lm, part) in enumerate(zip(pair.sharers, prepared.sharers, strict=True))
        ]
        stop = prepared.ids.shape[1] - 1
        stops = {c for part in prepared.sharers if part is not None for c in part.due.unique().tolist()}
        if stops - {0, stop}:  # the receiver is fused on its way, so its cache depends on the sharers'
            return pair.read(prepared, resume=Prefill(prepared, kv.new_cache(), theirs), timings=timings)
        own = self.caches(pair.receiver, [row.ids[:-1] for row in rows], timings, "receiver_prefill")
        cache = _batched(own, pair.receiver)
        with clock(timings, "fuse", pair.receiver.device), torch.no_grad():
            pair.fuse(cache, prepared.mask.to(pair.receiver.device), stop, prepared, theirs)
        return Prefill(prepared, cache, theirs, timings)

    def _store(self, lm: LanguageModel) -> PrefillStore | None:
        if self.folder is None:
            return None
        if id(lm) not in self._stores:
            store = PrefillStore(self.folder, lm.card, lm.dtype)
            store.check(lm)
            self._stores[id(lm)] = store
        return self._stores[id(lm)]


def _batched(caches: Sequence[torch.Tensor], lm: LanguageModel):
    return kv.from_tensors(list(zip(*left_padded(caches).to(lm.device), strict=True)))
