"""Prefills of a frozen model, computed once and kept on disk.

A frozen model reads the same tokens into the same cache every time, so training computes each prefill once and
later epochs, later runs and the evaluation of controls only read it. One store holds the caches of one model,
keyed by the token ids alone: prompts, alignments and fusers may change without making an entry stale.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import safe_open
from safetensors.torch import save_file

from cache2cache.errors import DataError
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.types import ModelCard

_SHARD_ROWS = 64


Ids = Sequence[int] | np.ndarray
"""Token ids of one prompt."""


def row_key(ids: Ids) -> str:
    """Key of one prompt: a digest of its token ids."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:24]


def prefill_rows(lm: LanguageModel, prompts: Sequence[Ids]) -> list[torch.Tensor]:
    """The cache of each prompt, (2, L, H, n, D) on the CPU, all read in one batch."""
    width = max(map(len, prompts))
    ids = torch.zeros((len(prompts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(prompts):
        ids[i, : len(row)] = torch.as_tensor(row)
        mask[i, : len(row)] = 1
    whole = kv.stack(kv.prefill(lm.model, ids.to(lm.device), mask.to(lm.device))).to("cpu")
    return [whole[:, :, i, :, : len(row)].contiguous() for i, row in enumerate(prompts)]


def by_length(prompts: Sequence[Ids], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of about the same length, the longest first.

    Args:
        batch_tokens: tokens, padding included, of one batch; a longer prompt is a batch of its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        count = max(1, batch_tokens // len(prompts[order[0]]))
        batch, order = order[:count], order[count:]
        yield batch


class PrefillStore:
    """Caches of one model on disk, (2, L, H, n, D) each, in safetensors shards that are written whole or not at all.

    Args:
        root: folder of all stores.
        card: the model.
        dtype: the dtype that the prefills are computed and stored in.
    """

    def __init__(self, root: str | Path, card: ModelCard, dtype: torch.dtype):
        identity = {"model": card.model_dump(mode="json"), "dtype": str(dtype)}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(root) / f"{card.id.replace('/', '--')}-{digest}"
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "model.json").write_text(json.dumps(identity, indent=1, sort_keys=True))
        self.card, self.dtype = card, dtype
        self._open = ExitStack()
        self._shard_of: dict[str, safe_open] = {}
        for path in sorted(self.folder.glob("*.safetensors")):
            self._index(path)

    def __contains__(self, ids: Ids) -> bool:
        return row_key(ids) in self._shard_of

    def __len__(self) -> int:
        return len(self._shard_of)

    def bytes_for(self, tokens: int) -> int:
        """Disk space that this many tokens take."""
        size = self.card.geometry
        return 2 * size.layers * size.features * self.dtype.itemsize * tokens

    def load(self, ids: Ids) -> torch.Tensor:
        """The cache of one prompt, (2, L, H, n, D).

        Raises:
            DataError: it was never computed.
        """
        key = row_key(ids)
        if key not in self._shard_of:
            raise DataError("no prefill stored for a prompt", got=f"{len(ids)} tokens", hint="Call compute() first")
        return self._shard_of[key].get_tensor(key)

    def compute(self, lm: LanguageModel, prompts: Iterable[Ids], *, batch_tokens: int = 1024) -> None:
        """Prefill whatever is missing, the longest first, so that the time left is never underestimated; an interrupted run
        goes on where it stopped.

        Args:
            batch_tokens: tokens, padding included, of one forward pass.
        """
        todo = {row_key(ids): list(ids) for ids in prompts if ids not in self}
        keys, missing = list(todo), list(todo.values())
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        ) as bar:
            task = bar.add_task(f"prefill {self.card.id}", total=sum(map(len, missing)))
            shard: dict[str, torch.Tensor] = {}
            for batch in by_length(missing, batch_tokens):
                rows = [missing[i] for i in batch]
                shard |= zip((keys[i] for i in batch), prefill_rows(lm, rows), strict=True)
                bar.advance(task, sum(map(len, rows)))
                if len(shard) >= _SHARD_ROWS:
                    self.add(shard)
                    shard = {}
            if shard:
                self.add(shard)

    def add(self, shard: dict[str, torch.Tensor]) -> None:
        """Keep the caches of these row keys, all of them or, if interrupted, none."""
        path = self.folder / f"{min(shard)}.safetensors"
        partial = path.with_suffix(f".partial-{os.getpid()}")
        save_file(shard, partial)
        partial.rename(path)
        self._index(path)

    def _index(self, path: Path) -> None:
        opened = self._open.enter_context(safe_open(str(path), framework="pt"))
        self._shard_of.update(dict.fromkeys(opened.keys(), opened))
