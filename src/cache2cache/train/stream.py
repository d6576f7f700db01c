"""Training rows that are read while they are needed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.utils.data import IterableDataset

from cache2cache.errors import DataError
from cache2cache.pipeline import C2C
from cache2cache.train import sources
from cache2cache.train.batch import Item, taught
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.contamination import Contamination, Dropped
from cache2cache.train.rows import train_rows
from cache2cache.train.teacher import SharedVocabulary, teachers


class RowStream(IterableDataset[Item]):
    """Pass after pass over a recipe's training rows, without features, for as long as somebody reads.

    Every iteration begins anew with the first pass, so that a resumed run can skip what it has seen.

    Args:
        avoid: keeps contaminated rows out.
    """

    def __init__(self, recipe: Recipe, pair: C2C, machine: Machine, avoid: Contamination):
        self._recipe, self._pair, self._machine, self._avoid = recipe, pair, machine, avoid
        self._too_long: dict[str, Dropped] = {}

    @property
    def dropped(self) -> list[Dropped]:
        """The rows that were left out so far, each once."""
        return list(({row.place: row for row in self._avoid.dropped} | self._too_long).values())

    def __iter__(self) -> Iterator[Item]:
        data = self._recipe.data
        passes = sources.stream(
            data.train, self._machine, seed=self._recipe.rows_seed, turns=data.turns, buffer=data.shuffle_buffer,
            keep=self._avoid.keep,
        )  # fmt: skip
        for examples in passes:
            empty = True
            for example in examples:
                rows, too_long = train_rows(
                    [example], self._pair, max_tokens=data.max_tokens, response_tokens=data.response_tokens,
                    fused=self._recipe.objective.fused,
                )  # fmt: skip
                self._too_long |= {row.place: row for row in too_long}
                for row in rows:
                    empty = False
                    yield Item(row, untaught=bool(self._recipe.objective.distill))
            if empty:
                raise DataError("no row of the stream can be trained on", got=f"{len(self.dropped)} dropped rows")


class Teach:
    """Asks the sharer for its distributions when a batch is about to be trained on.

    Args:
        top: tokens of a distribution.
    """

    def __init__(self, pair: C2C, top: int):
        self._pair, self._vocabulary, self._top = pair, SharedVocabulary(pair), top

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of untaught rows, with teachers; another as it is. See `batch.Collator`."""
        if "rows" not in batch:
            return batch
        found = list(teachers(batch["rows"], self._pair, self._vocabulary, self._top))
        rest = {name: x for name, x in batch.items() if name != "rows"}
        return rest | taught(found, batch["response"].shape[1])
