"""Prefills of a frozen model, computed once and kept on disk.

A frozen model reads the same tokens into the same cache every time, so training computes each prefill once and later epochs,
later runs and the evaluation only read it. One store holds the caches of one model, keyed by the token ids alone: prompts,
alignments and fusers may change without making a record stale.

On disk a record is one tensor (2, L, H, P, D) named by its key. If it holds only some positions of the prompt, they are
`<key>.positions` (P,); if only some layers, the shard's metadata names them.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cache2cache.errors import DataError
from cache2cache.models import kv, trees
from cache2cache.models.filling import fill
from cache2cache.models.load import LanguageModel, weights_fingerprint
from cache2cache.models.parts import Chosen, Ids, Part, chosen_positions, right_padded
from cache2cache.models.shards import Shard, Shards, damaged
from cache2cache.models.trees import Tree
from cache2cache.types import ModelCard

_POSITIONS, _LAYERS = ".positions", "layers"


def row_key(ids: Ids) -> str:
    """Key of one prompt: a digest of its token ids."""
    return hashlib.sha256(np.asarray(ids, dtype=np.int64).tobytes()).hexdigest()[:24]


def prefill_rows(
    lm: LanguageModel,
    prompts: Sequence[Ids],
    positions: Sequence[Chosen] | None = None,
    layers: Chosen = None,
) -> list[torch.Tensor]:
    """The cache of each prompt, (2, L, H, P, D) on the CPU, all read in one batch.

    Args:
        positions: which ones of each prompt; all by default.
        layers: which ones, in which order; all by default.
    """
    ids = right_padded(prompts)
    mask = right_padded([np.ones(len(row)) for row in prompts])
    chosen = chosen_positions(prompts, positions)
    cache = kv.prefill(lm.model, ids.to(lm.device), mask.to(lm.device))
    read = kv.gather(cache, right_padded(chosen).to(lm.device), None if layers is None else list(layers)).to("cpu")
    return [read[:, :, i, :, : len(row)].clone() for i, row in enumerate(chosen)]


def left_padded(caches: Sequence[torch.Tensor]) -> torch.Tensor:
    """(2, L, H, n, D) each → (2, L, B, H, N, D), zeros on the left."""
    width = max(cache.shape[3] for cache in caches)
    first = caches[0]
    out = first.new_zeros((*first.shape[:2], len(caches), first.shape[2], width, first.shape[4]))
    for b, cache in enumerate(caches):
        out[:, :, b, :, width - cache.shape[3] :] = cache
    return out


def default_batch_tokens(device: torch.device) -> int:
    """Tokens, padding included, of one forward pass over prompts."""
    return 1024 if device.type == "cpu" else 8192


def by_length(prompts: Sequence[Ids], batch_tokens: int) -> Iterator[list[int]]:
    """Indices of prompts in batches of about the same length, the longest first.

    Prompts that are left over by some of the batches are split into just the others.

    Args:
        batch_tokens: tokens, padding included, of one batch; a longer prompt is a batch of its own.
    """
    order = sorted(range(len(prompts)), key=lambda i: (-len(prompts[i]), i))
    while order:
        count = max(1, batch_tokens // max(1, len(prompts[order[0]])))
        batch, order = order[:count], order[count:]
        yield batch


@dataclass(frozen=True)
class _Prompt:
    """A record that is wanted, see `filling.Job`."""

    key: str
    ids: Ids
    part: Part
    size: int

    @property
    def tokens(self) -> int:
        return len(self.ids)


class PrefillStore:
    """Caches of one model on disk. A record may hold a part of a cache; a part of what a record holds can be had of it.

    Of several records that hold what is wanted, the oldest serves: what others add never changes what a run has read.

    Args:
        root: folder of all stores.
        card: the model.
        dtype: the dtype that the prefills are computed and stored in.

    Raises:
        DataError: a shard is damaged.
    """

    def __init__(self, root: str | Path, card: ModelCard, dtype: torch.dtype):
        identity = {"model": card.model_dump(mode="json"), "dtype": str(dtype)}
        self.card, self.dtype = card, dtype
        self._shards = Shards(root, card.id, identity, "model")

    @property
    def folder(self) -> Path:
        """Of this model's shards."""
        return self._shards.folder

    def __len__(self) -> int:
        """Number of prompts of which something is stored."""
        return sum(not name.endswith(_POSITIONS) for name in self._shards.names())

    def bytes_for(self, positions: int, layers: int | None = None) -> int:
        """Disk space that this many positions take, of this many layers; of all by default."""
        size = self.card.geometry
        return 2 * (size.layers if layers is None else layers) * size.features * self.dtype.itemsize * positions

    def holds(self, ids: Ids, positions: Chosen = None, layers: Chosen = None) -> bool:
        """Whether `load` would give this part of the prompt's cache."""
        return self._find(row_key(ids), self._part(ids, positions, layers)) is not None

    def load(self, ids: Ids, positions: Chosen = None, layers: Chosen = None) -> torch.Tensor:
        """The cache of one prompt, or a part of it, (2, L, H, P, D). Do not write into it.

        Args:
            positions: which ones, in which order; a position may be named more than once. All by default.
            layers: likewise.

        Raises:
            DataError: it was never computed; or its shard is damaged.
        """
        key = row_key(ids)
        found = self._find(key, self._part(ids, positions, layers))
        if found is None:
            raise DataError("no prefill stored for a prompt", got=f"{len(ids)} tokens", hint="Call compute() first")
        shard, part = found
        size = self.card.geometry
        depth = size.layers if part.layers is None else len(part.layers)
        width = len(ids) if part.positions is None else len(part.positions)
        cache = shard.read(key)
        if cache.shape != (2, depth, size.kv_heads, width, size.head_dim) or cache.dtype != self.dtype:
            raise damaged(shard.path, f"{key} of shape {tuple(cache.shape)} in {cache.dtype}")
        return part.pick(cache, positions, layers)

    def compute(
        self,
        lm: LanguageModel,
        prompts: Iterable[Ids],
        positions: Iterable[Chosen] | None = None,
        layers: Chosen = None,
        *,
        batch_tokens: int | None = None,
    ) -> None:
        """Prefill whatever is missing; an interrupted call goes on where it stopped. Says first how much that is.

        Prompts that begin alike are read together, their common beginning once.

        With several processes, each computes a part, and all of them call this.

        Args:
            positions: which ones of each prompt are wanted; all by default.
            layers: which ones are wanted; all by default.
            batch_tokens: tokens, padding included, of one forward pass; see `default_batch_tokens`.

        Raises:
            DataError: no room on the disk, a folder that cannot be written to, or other weights than the store's.
        """
        self.check(lm)
        if batch_tokens is None:
            batch_tokens = default_batch_tokens(lm.device)
        wanted = self._wanted(prompts, positions, layers)
        kept = wanted[0].part.layers if wanted else None

        @functools.cache
        def readable() -> bool:
            return trees.readable(lm, max(p.tokens for p in wanted))

        def grown(todo: Sequence[_Prompt]) -> list[Tree]:
            prompts = [p.ids for p in todo]
            found = trees.grow(prompts, [p.key for p in todo])
            return found if len(found) == len(todo) or readable() else trees.alone(prompts)

        def batched(todo: Sequence[_Prompt]) -> Iterator[list[_Prompt]]:
            found = grown(todo)
            for batch in by_length([range(tree.tokens) for tree in found], batch_tokens):
                yield [todo[i] for at in batch for i in found[at].rows]

        def computed(batch: Sequence[_Prompt]) -> dict[str, torch.Tensor]:
            prompts, places = [p.ids for p in batch], [p.part.positions for p in batch]
            found = grown(batch)
            if len(found) == len(batch):
                caches = prefill_rows(lm, prompts, places, kept)
            else:
                caches = trees.read(lm, prompts, found, places, kept)
            kept_places = {p.key + _POSITIONS: p.part.positions for p in batch if p.part.positions is not None}
            return dict(zip((p.key for p in batch), caches, strict=True)) | {
                name: torch.as_tensor(place) for name, place in kept_places.items()
            }

        fill(
            self._shards,
            f"prefills of {self.card.id}",
            wanted,
            lambda prompt: self._find(prompt.key, prompt.part) is not None,
            batched,
            computed,
            None if kept is None else {_LAYERS: json.dumps(kept.tolist())},
        )

    def add(self, caches: Mapping[str, torch.Tensor]) -> None:
        """Keep the whole caches of these row keys, all of them or, if interrupted, none."""
        self._shards.write(caches)

    def check(self, lm: LanguageModel) -> None:
        """Raise DataError if the store holds prefills of other weights under this model's name. The first to ask decides."""
        self._shards.claim(weights_fingerprint(lm.model))

    def _part(self, ids: Ids, positions: Chosen, layers: Chosen) -> Part:
        return Part.of(positions, layers, len(ids), self.card.geometry.layers)

    def _wanted(self, prompts: Iterable[Ids], positions: Iterable[Chosen] | None, layers: Chosen) -> list[_Prompt]:
        """One record for each prompt, with all positions that are wanted of it."""
        prompts = list(prompts)
        places: dict[str, list[np.ndarray]] = {}
        for ids, some in zip(prompts, [None] * len(prompts) if positions is None else positions, strict=True):
            at = np.arange(len(ids)) if some is None else np.asarray(some, dtype=np.int64)
            places.setdefault(row_key(ids), []).append(at)
        wanted = []
        for key, ids in {row_key(ids): ids for ids in prompts}.items():
            part = self._part(ids, np.concatenate(places[key]), layers)
            width = len(ids) if part.positions is None else len(part.positions)
            depth = None if part.layers is None else len(part.layers)
            wanted.append(_Prompt(key, ids, part, self.bytes_for(width, depth)))
        return wanted

    def _find(self, key: str, wanted: Part) -> tuple[Shard, Part] | None:
        """The oldest shard that holds a part, and what it holds."""
        for shard in self._shards.holders(key):
            places, layers = key + _POSITIONS, shard.metadata.get(_LAYERS)
            part = Part(
                shard.read(places).numpy() if places in shard.names else None,
                None if layers is None else np.asarray(json.loads(layers)),
            )
            if part.covers(wanted):
                return shard, part
        return None
