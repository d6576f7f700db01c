"""The order in which rows are trained on."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

from torch.utils.data import Sampler

_SORTED_TOGETHER = 50


class Order(Sampler[int]):
    """A permutation of all rows that seed and epoch decide alone, so that a resumed run sees what an uninterrupted one does.

    With groups, rows of about the same length come together: a permutation is cut into runs of 50 groups, each run is
    sorted by length, and the groups change places. Rows that do not fill a group come last.

    Args:
        lengths: tokens of each row.
        group: rows of one optimizer step on all processes; None for no groups.
    """

    def __init__(self, lengths: Sequence[int], *, seed: int, group: int | None = None):
        self._lengths, self._seed, self._group, self._epoch = lengths, seed, group, 0

    def set_epoch(self, epoch: int) -> None:
        """Let the next pass be the one with this number, counted from 0."""
        self._epoch = epoch

    def __len__(self) -> int:
        return len(self._lengths)

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed}, epoch {self._epoch}")
        rows = list(range(len(self._lengths)))
        draw.shuffle(rows)
        return iter(rows if self._group is None else self._grouped(rows, self._group, draw))

    def _grouped(self, rows: list[int], size: int, draw: random.Random) -> list[int]:
        full = len(rows) // size * size
        groups = []
        for start in range(0, full, size * _SORTED_TOGETHER):
            run = sorted(rows[start : min(start + size * _SORTED_TOGETHER, full)], key=self._lengths.__getitem__)
            groups += [run[at : at + size] for at in range(0, len(run), size)]
        draw.shuffle(groups)
        return [row for group in (*groups, rows[full:]) for row in group]
