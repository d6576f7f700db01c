"""Query routing: each question goes to one of two models, and a router that saw training rows decides to which."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

from cache2cache.errors import DataError
from cache2cache.evaluate.forms import Form, kind_of
from cache2cache.evaluate.items import Answer, Item, System
from cache2cache.evaluate.prefills import Prefills
from cache2cache.pipeline import C2C
from cache2cache.types import Timings

DEFAULT_SHARE = 0.5

EMBEDDED = "chat"
"""The form in which the receiver reads a question to embed it."""


class Embedder:
    """A question as the receiver's own reading of it: its cached values, averaged over the prompt's positions."""

    def __init__(self, receiver: C2C, prefills: Prefills):
        self._receiver, self._prefills = receiver, prefills

    def __call__(self, items: Sequence[Item], timings: Timings | None = None) -> tuple[np.ndarray, list[int]]:
        """(rows, L · H · D) float32, and how many tokens were read of each."""
        timings = timings or Timings()
        rows = self._receiver.rows([item.messages for item in items], timings=timings)
        prompts = [row.ids[:-1] for row in rows]
        caches = self._prefills.caches(self._receiver.receiver, prompts, timings, "receiver_prefill")
        embedded = np.stack([cache[1].float().mean(2).flatten().numpy() for cache in caches])
        return embedded, [len(prompt) for prompt in prompts]


@dataclass(frozen=True)
class Router:
    """A linear score of a question: the higher, the more the sharer serves it better than the receiver."""

    weights: np.ndarray
    """(features,)"""
    threshold: float
    """Questions that score higher go to the sharer."""
    share: float
    """Fraction of the training questions that do."""
    training_rows: int

    @classmethod
    def fit(
        cls, embedded: np.ndarray, receiver: Sequence[float], sharer: Sequence[float], share: float = DEFAULT_SHARE
    ) -> Router:
        """Logistic regression on training rows.

        Args:
            embedded: (rows, features)
            receiver, sharer: how well each model served each row; more is better. Rows on which they are level say
                nothing about who is better and are left out, except for the threshold.
            share: the fraction of questions to send to the sharer; those with the highest scores.

        Raises:
            DataError: a share outside 0–1, or nothing to learn.
        """
        from sklearn.linear_model import LogisticRegression

        if not 0 <= share <= 1:
            raise DataError("the routed share must lie between 0 and 1", got=share)
        better = np.asarray(sharer) - np.asarray(receiver)
        told = better != 0
        if len(set((better[told] > 0).tolist())) < 2:
            raise DataError(
                "the router has nothing to learn: on the training rows one model is never better than the other",
                got=f"{int(told.sum())} of {len(better)} rows differ",
                hint="Use more training rows, or leave routing out",
            )
        mean, scale = embedded.mean(0), embedded.std(0) + 1e-6
        # More features than rows: strong regularisation, since only a broad direction can be learnt.
        model = LogisticRegression(C=1e-3, max_iter=1000).fit((embedded[told] - mean) / scale, better[told] > 0)
        weights = (model.coef_[0] / scale).astype(np.float32)
        # From training rows too, so that a question is routed without looking at the others that are asked.
        threshold = float(np.quantile(embedded @ weights, 1 - share))
        return cls(weights, threshold, share, len(better))

    def to_sharer(self, embedded: np.ndarray) -> list[bool]:
        """Which questions, (rows, features), go to the sharer."""
        return (embedded @ self.weights > self.threshold).tolist()

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        save_file({"weights": self.weights}, path, metadata={"router": json.dumps(self.summary())})

    def summary(self) -> dict[str, float]:
        """All but the weights."""
        return {"threshold": self.threshold, "share": self.share, "training_rows": self.training_rows}

    @classmethod
    def load(cls, path: Path) -> Router:
        """Read what `save` wrote."""
        with safe_open(path, framework="numpy") as file:
            return cls(file.get_tensor("weights"), **json.loads(file.metadata()["router"]))


class Remembered:
    """A system that keeps its answers to a batch, for a system that is built on it."""

    def __init__(self, system: System):
        self.name = system.name
        self._system = system
        self._held: dict[tuple[str, str], Answer] = {}

    def clear(self) -> None:
        """Forget the answers."""
        self._held.clear()

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """See `System`."""
        missing = [item for item in items if (item.task, item.id) not in self._held]
        if missing:
            for item, answer in zip(missing, self._system.answer(missing), strict=True):
                self._held[item.task, item.id] = answer
        return [self._held[item.task, item.id] for item in items]


class Routing:
    """A router before the two models alone.

    Args:
        routers: one per kind of item, "choice" and "text".
        forms: in which the receiver is asked when it answers.
    """

    def __init__(
        self,
        name: str,
        routers: Mapping[str, Router],
        embed: Embedder,
        receiver: System,
        sharer: System,
        forms: Mapping[str, Form],
    ):
        self.name = name
        self._routers, self._embed, self._forms = routers, embed, forms
        self._models = {"receiver": receiver, "sharer": sharer}

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        """See `System`. What deciding takes is counted beside what the chosen model takes."""
        start, timings = time.perf_counter(), Timings()
        embedded, read = self._embed(items, timings)
        kind = kind_of(items[0])
        to_sharer = self._routers[kind].to_sharer(embedded)
        seconds = time.perf_counter() - start
        routes = ["sharer" if there else "receiver" for there in to_sharer]
        # Each model is asked the whole batch, as where it answers for itself: what else is in a batch moves its rounding.
        found = {name: self._models[name].answer(items) for name in sorted(set(routes))}
        known = {"sharer": False, "receiver": self._forms[kind].name == EMBEDDED}  # then the prompt is not read again
        return [
            _decided(replace(found[route][row], route=route), timings, seconds, 0 if known[route] else read[row])
            for row, route in enumerate(routes)
        ]


def _decided(answer: Answer, timings: Timings, seconds: float, read: int) -> Answer:
    """An answer with what it took to decide who gives it.

    Args:
        read: tokens that the receiver read only for that.
    """
    stages = {stage: spent + getattr(answer.timings, stage) for stage, spent in vars(timings).items()}
    cost = replace(answer.cost, receiver_read=answer.cost.receiver_read + read)
    return replace(answer, timings=Timings(**stages), seconds=seconds + answer.seconds, cost=cost)
