"""What fewer bits cost: the same rows, answered from caches that have travelled in each precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from payload_service import wanted

from cache2cache.evaluate import folder, scoring, stats, tasks
from cache2cache.evaluate.heard import Own
from cache2cache.evaluate.identity import rows_digest, weights_digest
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.plan import make_plan
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.rowfile import read_records
from cache2cache.evaluate.runner import run
from cache2cache.evaluate.schema import RowRecord
from cache2cache.evaluate.tasks.base import Scored, Task, nats_per_token
from cache2cache.inputs import Row
from cache2cache.models.load import weights_fingerprint
from cache2cache.pipeline import C2C
from cache2cache.serve.payload import Precision, SharerCache, ids_digest
from cache2cache.types import Timings

UNSENT = "as it is"
"""The system whose caches do not travel."""


class Travelled(Own):
    """Own caches, after they were bytes. What was not sent is zero."""

    def __init__(self, pair: C2C, prefills: Prefills, precision: Precision | None):
        super().__init__(pair, prefills)
        self._precision: Precision | None = precision

    def heard(self, sharer: int, rows: Sequence[Row], timings: Timings) -> list[torch.Tensor]:
        """See `Own`."""
        caches = super().heard(sharer, rows, timings)
        if self._precision is None:
            return caches
        return [self._travelled(row, cache) for row, cache in zip(rows, caches, strict=True)]

    def _travelled(self, row: Row, cache: torch.Tensor) -> torch.Tensor:
        (lm,), (part,) = self._pair.sharers, row.sharers
        assert part is not None, "the sharer speaks"
        positions, layers = wanted(self._pair, row)
        sent = cache[:, list(layers)][:, :, :, positions]
        held = SharerCache(lm.card, ids_digest(part.ids), len(part.ids), torch.tensor(positions), layers, sent)
        data = held.to_bytes(precision=self._precision)
        arrived = SharerCache.from_bytes(data, max_bytes=1 << 32).kv.to(cache.dtype)
        there = torch.zeros_like(cache)
        for u, layer in enumerate(layers):
            there[:, layer][:, :, positions] = arrived[:, u]
        return there


class Precise:
    """C2C that is asked for the likelihood of the right answer as well as for the likeliest letter. See `System`."""

    def __init__(self, pair: C2C, prefills: Prefills, precision: Precision | None):
        self.name = precision or UNSENT
        self._pair, self._prefills, self._listen = pair, prefills, Travelled(pair, prefills, precision)

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """See `System`."""
        lm, timings = self._pair.receiver, Timings()
        rows, heard = self._listen(items, self._pair.rows([item.messages for item in items]))
        prefill = self._prefills.fused(self._pair, rows, heard, timings)
        targets = [scoring.target_ids(lm, prefill.ids[b], item.target) for b, item in enumerate(items)]
        nats = scoring.target_nats(lm, prefill, targets)
        answers = scoring.answers(self._pair, prefill, items, lm.tokenizer)
        return [
            replace(answer, target_nats=x, target_tokens=len(target))
            for answer, x, target in zip(answers, nats, targets, strict=True)
        ]


@dataclass(frozen=True)
class Scorer:
    """A multiple-choice task's score, and the nats of the right answer among all that could be said."""

    task: Task

    @property
    def name(self) -> str:
        """The task's."""
        return self.task.name

    def score(self, item: Item, answer: Answer) -> Scored:
        """See `Task.score`."""
        right = self.task.score(item, answer).metrics["likelihood"]
        return Scored(None, {"likelihood": right, "nats": nats_per_token(answer)})


def loss(
    pair: C2C,
    precisions: Sequence[Precision],
    names: Sequence[str],
    out: Path,
    *,
    data_dir: Path | None,
    limit: int | None,
    batch_size: int,
    prefills: Path | None,
) -> dict[str, Any]:
    """Ask every row in every precision; goes on with what `out` holds already.

    Args:
        names: multiple-choice tasks.
        limit: rows of each task.
        prefills: folder that keeps them.
    """
    chosen = [tasks.get(name) for name in names]
    loaded = {task.name: tasks.load(task, data_dir=data_dir, limit=limit).items for task in chosen}
    items = {name: [replace(item, max_new_tokens=1) for item in rows] for name, rows in loaded.items()}
    held = Prefills(prefills)
    systems = [Precise(pair, held, precision) for precision in (None, *precisions)]
    tokenizer = pair.sharers[0].tokenizer
    plan = make_plan(
        items, [system.name for system in systems], batch_size=batch_size,
        length=lambda item: len(tokenizer(item.messages[-1]["content"])["input_ids"]),  # type: ignore[arg-type]
    )  # fmt: skip
    models = [[lm.card.id, weights_fingerprint(lm.model)] for lm in (pair.receiver, *pair.sharers)]
    settings = {
        "models": models, "dtype": str(pair.receiver.dtype), "fusers": [weights_digest(fuser) for fuser in pair.fusers],
        "rows": {name: rows_digest(rows) for name, rows in items.items()},
    }  # fmt: skip
    run(
        plan, systems, [Scorer(task) for task in chosen], out,
        settings=settings, max_errors=0, on_batch=lambda _: held.clear(),
    )  # fmt: skip
    return compared(read_records(out / folder.ROWS, RowRecord))


def compared(rows: Sequence[RowRecord]) -> dict[str, Any]:
    """By task, and over all of them, what each precision does, and how it differs from what was not sent."""
    named = dict.fromkeys(row.task for row in rows)
    groups = {name: [row for row in rows if row.task == name] for name in named}
    return {name: _compared(group) for name, group in (groups | {"all": list(rows)}).items()}


def _compared(rows: Sequence[RowRecord]) -> dict[str, Any]:
    by_system: dict[str, dict[tuple[str, str], Mapping[str, float]]] = {}
    for row in rows:
        by_system.setdefault(row.system, {})[row.task, row.id] = row.metrics
    base, found = by_system[UNSENT], {}
    for name, own in by_system.items():
        right, nats = ([own[key][metric] for key in base] for metric in ("likelihood", "nats"))
        found[name] = {"rows": len(base), "accuracy": sum(right) / len(right), "nats": sum(nats) / len(nats)}
        if name != UNSENT:
            base_right, base_nats = ([base[key][metric] for key in base] for metric in ("likelihood", "nats"))
            p, gained, lost = stats.mcnemar(right, base_right)
            found[name] |= {
                "accuracy_difference": stats.paired(right, base_right, (0, 1)).model_dump(),
                "p": p, "gained": gained, "lost": lost,
                "nats_difference": stats.paired(nats, base_nats).model_dump(),
            }  # fmt: skip
    return found
