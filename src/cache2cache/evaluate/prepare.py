"""Before anything is measured: each model's prompt form and the router, decided on training rows and kept in the folder."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cache2cache.errors import DataError
from cache2cache.evaluate import folder
from cache2cache.evaluate.asking import Tell
from cache2cache.evaluate.build import numbered
from cache2cache.evaluate.forms import candidates, kind_of, named
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.routing import Embedder, Router
from cache2cache.evaluate.systems import Alone, Forms
from cache2cache.evaluate.training import ROUTER_ROWS, Chosen, choose_form, pooled, train_router
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C


@dataclass
class Decisions:
    """What was decided."""

    forms: dict[str, dict[str, Chosen]]
    """Model ("receiver", "sharer", "sharer-2", …) → kind of item → form."""
    routers: dict[str, Router]
    """By kind of item; empty without routing."""

    def of(self, model: str) -> Forms:
        """The forms of one model."""
        return {kind: chosen.form for kind, chosen in self.forms[model].items()}

    def summary(self) -> dict[str, Any]:
        """For the report."""
        return {
            "forms": {
                model: {kind: chosen.summary() for kind, chosen in kinds.items()} for model, kinds in self.forms.items()
            },
            "router": {kind: router.summary() for kind, router in self.routers.items()},
        }


def decide(
    pair: C2C,
    tasks: Mapping[str, Sequence[Item]],
    training: Callable[[str, int], Sequence[Item]],
    prefills: Prefills,
    out: Path,
    *,
    given: Mapping[str, str | None],
    routed_share: float | None,
    batch_size: int,
    tell: Tell,
) -> Decisions:
    """Decide, or read what was decided before the run was interrupted.

    Args:
        tasks: name → rows that will be asked.
        training: (task, rows) → so many training rows of it, or none.
        given: "receiver" and "sharer" → name of the form to take (`check_forms`), None to choose one.
        routed_share: None if nothing is routed.
        batch_size: most training rows that are asked together.
        tell: told which training rows could not be asked.

    Raises:
        DataError: a router without anything to learn.
        EvaluationError: training rows of which none can be asked.
    """
    models = {"receiver": pair.receiver} | {numbered("sharer", i): lm for i, lm in enumerate(pair.sharers)}
    kinds = sorted({kind_of(items[0]) for items in tasks.values()})
    decisions = _kept(out) or Decisions({}, {})
    choosing = not decisions.forms
    routing = routed_share is not None and not decisions.routers
    each = math.ceil(ROUTER_ROWS / len(tasks))
    sampled = [training(name, each) for name in tasks] if routing or (choosing and not all(given.values())) else []
    how: dict[str, Any] = {"batch_size": batch_size, "tell": tell}
    for kind in kinds:
        rows = pooled(sampled, kind)
        for name, lm in models.items() if choosing else ():
            role = name.partition("-")[0]
            decisions.forms.setdefault(name, {})[kind] = choose_form(
                lm, rows, prefills, pair.receiver, given=given[role], sharer=role == "sharer", **how
            )
        if routing:
            assert routed_share is not None
            decisions.routers[kind] = _routed(pair, decisions, kind, rows, prefills, routed_share, **how)
    if choosing or routing:
        _keep(out, decisions)
    return decisions


def check_forms(given: Mapping[str, str | None], tasks: Mapping[str, Sequence[Item]]) -> None:
    """Refuse forms that are unknown or that a task cannot be asked in.

    Args:
        given: "receiver" and "sharer" → name of a form, or None.
        tasks: name → rows.

    Raises:
        DataError: one of them is.
    """
    for role, form in given.items():
        for task, items in tasks.items() if form is not None else ():
            possible = candidates(items)
            if named(str(form)) not in possible:
                raise DataError(
                    f"{task} cannot be asked in the {role}'s form", got=form,
                    allowed=", ".join(one.name for one in possible), hint=f"Evaluate it without --{role}-form, or by itself",
                )  # fmt: skip


def _kept(out: Path) -> Decisions | None:
    path = out / folder.DECISIONS
    if not path.is_file():
        return None
    kept = json.loads(path.read_text(encoding="utf-8"))
    forms = {
        model: {kind: Chosen.from_summary(one) for kind, one in kinds.items()} for model, kinds in kept["forms"].items()
    }
    return Decisions(forms, {kind: Router.load(_router(out, kind)) for kind in kept["router"]})


def _keep(out: Path, decisions: Decisions) -> None:
    for kind, router in decisions.routers.items():
        router.save(_router(out, kind))
    partial = (out / folder.DECISIONS).with_suffix(".partial")
    partial.write_text(json.dumps(decisions.summary(), indent=1), encoding="utf-8")
    partial.rename(out / folder.DECISIONS)


def _routed(
    pair: C2C, decisions: Decisions, kind: str, rows: Sequence[Item], prefills: Prefills, share: float, **how: Any
) -> Router:
    def alone(name: str, lm: LanguageModel) -> Alone:
        return Alone(
            name, lm, {kind: decisions.forms[name][kind].form}, prefills, pair.receiver, sharer=name == "sharer"
        )

    embed = Embedder(C2C(pair.receiver), prefills)
    return train_router(
        embed, alone("receiver", pair.receiver), alone("sharer", pair.sharers[0]), rows, prefills, share, **how
    )


def _router(out: Path, kind: str) -> Path:
    return out / folder.ROUTERS.format(kind)
