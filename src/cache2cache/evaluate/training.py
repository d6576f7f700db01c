"""What is decided on training rows before anything is measured: each model's prompt form, and the router."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cache2cache.errors import DataError
from cache2cache.evaluate.asking import Tell, in_parts, tell_left_out
from cache2cache.evaluate.forms import DEFAULT, Form, candidates, kind_of, named
from cache2cache.evaluate.items import Answer, Item
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.routing import Embedder, Router
from cache2cache.evaluate.systems import Alone
from cache2cache.models.load import LanguageModel

FORM_ROWS = 100
"""Training rows that a form is chosen on."""

ROUTER_ROWS = 300
"""Training rows that a router learns from."""


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
    batch_size: int,
    tell: Tell,
) -> Chosen:
    """The form that serves a model best on training items of one kind; of equal ones the first in `FORMS`.

    Args:
        given: the name of the form to take without trying any.
        batch_size: most rows that are asked together.
        tell: told which rows the model could not be asked in every form; the choice is made on the others.

    Raises:
        EvaluationError: a form in which none of the rows can be asked.
        DataError: no row that can be asked in every form.
    """
    if given is not None:
        return Chosen(named(given), 0, {})
    if not items:
        return Chosen(named(DEFAULT), 0, {})
    items = items[:FORM_ROWS]
    forms, left_out = candidates(items), {}
    by_form = np.zeros((len(forms), len(items)))
    for row, form in enumerate(forms):
        alone = Alone(form.name, lm, {kind_of(items[0]): form}, prefills, unit, sharer=sharer)
        by_form[row], failed = served(alone, items, prefills, batch_size)
        left_out |= failed
    tell_left_out(tell, left_out, f"the choice of a form for {lm.card.id}")
    asked = _asked_by_all(by_form)
    scores = {form.name: round(float(of.mean()), 4) for form, of in zip(forms, by_form[:, asked], strict=True)}
    return Chosen(named(max(scores, key=lambda name: scores[name])), int(asked.sum()), scores)


def served(
    system: Alone, items: Sequence[Item], prefills: Prefills, batch_size: int
) -> tuple[np.ndarray, dict[str, str]]:
    """How well a model serves each item: 1 for the right letter and 0 for others, or minus nats per token.

    Returns:
        (rows,), NaN for those that it could not be asked; and which, and why, see `asking.in_parts`.
    """

    def ask(items: Sequence[Item]) -> list[float]:
        prefills.clear()
        # The first token tells the letter; a text's likelihood needs none.
        asked = [replace(item, max_new_tokens=1 if item.letters else 0) for item in items]
        return [_served(item, answer) for item, answer in zip(asked, system.answer(asked), strict=True)]

    order = sorted(range(len(items)), key=lambda row: -len(items[row].messages[-1]["content"]))
    found, failed = in_parts([items[row] for row in order], batch_size, ask)
    prefills.clear()
    out = np.zeros(len(items))
    out[order] = [np.nan if score is None else score for score in found]
    return out, failed


def _served(item: Item, answer: Answer) -> float:
    if item.letters:
        return item.letters[int(np.argmax(answer.letter_logprobs))] == item.target
    assert answer.target_nats is not None, "items without letters are measured by their target"
    if not math.isfinite(answer.target_nats):
        raise FloatingPointError(f"target_nats is {answer.target_nats}")
    return -answer.target_nats / max(answer.target_tokens, 1)


def _asked_by_all(scores: np.ndarray) -> np.ndarray:
    """Of (ways, rows) the rows that have a score in each, (rows,) bool.

    Raises:
        DataError: there is none.
    """
    asked = np.asarray(np.isfinite(scores).all(0))
    if not asked.any():
        raise DataError("no training row can be asked in every way that is compared", got=f"{len(asked)} rows")
    return asked


def train_router(
    embed: Embedder,
    receiver: Alone,
    sharer: Alone,
    items: Sequence[Item],
    prefills: Prefills,
    share: float,
    *,
    batch_size: int,
    tell: Tell,
) -> Router:
    """Fit a router on training items of one kind.

    Args:
        batch_size: most rows that are asked together.
        tell: told which rows could not be asked; it learns from the others.

    Raises:
        DataError: no training rows, or nothing to learn from them.
        EvaluationError: none of them can be asked.
    """
    if not items:
        raise no_training_rows()
    items = items[:ROUTER_ROWS]

    def embedded(items: Sequence[Item]) -> list[np.ndarray]:
        prefills.clear()
        return list(embed(items)[0])

    read, unread = in_parts(items, batch_size, embedded)
    (ours, not_ours), (theirs, not_theirs) = (
        served(model, items, prefills, batch_size) for model in (receiver, sharer)
    )
    tell_left_out(tell, unread | not_ours | not_theirs, "the rows that the router learns from")
    asked = _asked_by_all(np.stack([np.where([x is None for x in read], np.nan, 0.0), ours, theirs]))
    rows = np.stack([x for x, chosen in zip(read, asked, strict=True) if x is not None and chosen])
    return Router.fit(rows, ours[asked].tolist(), theirs[asked].tolist(), share)


def no_training_rows() -> DataError:
    """What is wrong where a router has nothing to learn from."""
    return DataError(
        "routing needs training rows, and the tasks have none",
        hint="Leave routing out, or add a task with training rows",
    )


def pooled(rows: Sequence[Sequence[Item]], kind: str) -> list[Item]:
    """The training items of one kind, the tasks taking turns, so that any number from the front is balanced."""
    chosen = [items for items in rows if items and kind_of(items[0]) == kind]
    width = max(map(len, chosen), default=0)
    return [items[at] for at in range(width) for items in chosen if at < len(items)]
