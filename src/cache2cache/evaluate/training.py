"""What is decided on training rows before anything is measured: each model's prompt form, and the router."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cache2cache.errors import DataError
from cache2cache.evaluate.forms import DEFAULT, Form, candidates, kind_of, named
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.routing import Embedder, Router
from cache2cache.evaluate.systems import Alone
from cache2cache.models.load import LanguageModel

FORM_ROWS = 100
"""Training rows that a form is chosen on."""

ROUTER_ROWS = 300
"""Training rows that a router learns from."""

_BATCH = 16


@dataclass(frozen=True)
class Chosen:
    """A model's form for one kind of item, and how it was found."""

    form: Form
    rows: int
    """Training rows that it was chosen on; 0 if it was given, or is the default because there are none."""
    scores: Mapping[str, float]
    """By form: share of right letters, or for text minus the nats per token of the target."""

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {"form": self.form.name, "rows": self.rows, "scores": dict(self.scores)}

    @classmethod
    def from_summary(cls, summary: Mapping[str, Any]) -> Chosen:
        """What `summary` was made of."""
        return cls(named(summary["form"]), summary["rows"], summary["scores"])


def choose_form(
    lm: LanguageModel,
    items: Sequence[Item],
    prefills: Prefills,
    unit: LanguageModel,
    *,
    given: str | None,
    sharer: bool,
) -> Chosen:
    """The form that serves a model best on training items of one kind; of equal ones the first in `FORMS`.

    Args:
        given: the name of the form to take without trying any.
    """
    if given is not None:
        return Chosen(named(given), 0, {})
    if not items:
        return Chosen(named(DEFAULT), 0, {})
    items = items[:FORM_ROWS]
    scores = {
        form.name: round(float(served(Alone(form.name, lm, {kind_of(items[0]): form}, prefills, unit, sharer=sharer),
                                      items, prefills).mean()), 4)
        for form in candidates(items)
    }  # fmt: skip
    return Chosen(named(max(scores, key=lambda name: scores[name])), len(items), scores)


def served(system: Alone, items: Sequence[Item], prefills: Prefills) -> np.ndarray:
    """How well a model serves each item, (rows,): 1 for the right letter and 0 for others, or minus nats per token."""
    out = np.zeros(len(items))
    order = sorted(range(len(items)), key=lambda row: -len(items[row].messages[-1]["content"]))
    for at in range(0, len(order), _BATCH):
        batch = order[at : at + _BATCH]
        # The first token tells the letter; a text's likelihood needs none.
        asked = [replace(items[row], max_new_tokens=1 if items[row].letters else 0) for row in batch]
        for row, item, answer in zip(batch, asked, system.answer(asked), strict=True):
            if item.letters:
                out[row] = item.letters[int(np.argmax(answer.letter_logprobs))] == item.target
            else:
                assert answer.target_nats is not None, "items without letters are measured by their target"
                out[row] = -answer.target_nats / max(answer.target_tokens, 1)
        prefills.clear()
    return out


def train_router(
    embed: Embedder, receiver: Alone, sharer: Alone, items: Sequence[Item], prefills: Prefills, share: float
) -> Router:
    """Fit a router on training items of one kind.

    Raises:
        DataError: no training rows, or nothing to learn from them.
    """
    if not items:
        raise DataError(
            "routing needs training rows, and the tasks have none",
            hint="Leave routing out, or add a task with training rows",
        )
    items = items[:ROUTER_ROWS]
    embedded = []
    for at in range(0, len(items), _BATCH):
        embedded.append(embed(items[at : at + _BATCH])[0])
        prefills.clear()
    ours, theirs = (served(model, items, prefills) for model in (receiver, sharer))
    return Router.fit(np.concatenate(embedded), ours.tolist(), theirs.tolist(), share)


def pooled(rows: Sequence[Sequence[Item]], kind: str) -> list[Item]:
    """The training items of one kind, the tasks taking turns, so that any number from the front is balanced."""
    chosen = [items for items in rows if items and kind_of(items[0]) == kind]
    width = max(map(len, chosen), default=0)
    return [items[at] for at in range(width) for items in chosen if at < len(items)]
