"""What a task is: where its rows lie, how a row is asked, and how an answer is scored.

A task knows no model and reads no file; `load` does the reading.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ValidationError

from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate.items import Answer, Item

Kind = Literal["choice", "generation", "likelihood"]
Split = Literal["test", "train"]
Row = Mapping[str, Any]
_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True)
class Metric:
    """One number that a row gets."""

    name: str
    label: str
    binary: bool
    """Whether it is 0 or 1."""
    lower_is_better: bool = False


METRICS: Mapping[str, Metric] = MappingProxyType(
    {
        metric.name: metric
        for metric in (
            Metric("likelihood", "likeliest letter is right", binary=True),
            Metric("generate", "letter named in the answer is right", binary=True),
            Metric("correct", "number in the answer is right", binary=True),
            Metric("f1", "F1 of words", binary=False),
            Metric("em", "exact match", binary=True),
            Metric("nats", "nats per token of the reference", binary=False, lower_is_better=True),
        )
    }
)
"""Every metric by its name."""


@dataclass(frozen=True)
class Source:
    """One split of a public data set, in a local folder and on the hub."""

    path: str
    """In the data folder, without ending: arc_easy/test for arc_easy/test.jsonl.zst or arc_easy/test.jsonl."""
    repo: str
    """Data set repository on the hub."""
    configs: tuple[str, ...]
    """Read one after the other; several where the hub keeps each subject apart."""
    split: str
    """Its name on the hub."""
    # The hub could not be reached from where this was written: revisions are the commits that other public evaluation
    # code pins, and `from_hub` follows the published schemas. Neither has been tried against the hub itself.
    revision: str


@dataclass(frozen=True)
class File:
    """A user's own file."""

    path: Path


@dataclass(frozen=True)
class Scored:
    """What a task makes of an answer."""

    extracted: str | None
    """What could be read out of the answer; None if nothing could, or if no text was asked for."""
    metrics: dict[str, float]
    """One number for each of the task's metrics."""


@dataclass(frozen=True)
class Loaded:
    """The rows of one split that are asked."""

    items: list[Item]
    dropped: dict[str, int]
    """Rows left out, by reason."""
    source: str
    """What was read: a path, or repository@revision."""


@dataclass(frozen=True)
class Task(ABC):
    """One benchmark. Rows are dicts in the layout of the local folder, whether they come from there or from the hub."""

    name: str
    title: str
    licence: str
    """Of the data."""
    sources: Mapping[Split, Source | File]
    """`test` is asked; `train`, where there is one, serves to choose prompt forms and to train a router."""

    kind: ClassVar[Kind]
    metrics: ClassVar[tuple[str, ...]]
    """Names in `METRICS`, the most telling first."""

    @property
    def primary(self) -> str:
        """The metric that tables and figures show first."""
        return self.metrics[0]

    @abstractmethod
    def item(self, row: Row) -> Item:
        """A row as it is asked.

        Raises:
            DataError: the row has another form.
        """

    @abstractmethod
    def score(self, item: Item, answer: Answer) -> Scored:
        """Score an answer to one of this task's items.

        Raises:
            EvaluationError: the answer lacks a number that every system must give.
        """

    def from_hub(self, row: Row, config: str) -> dict[str, Any]:
        """A row of the hub's layout in the local one. May raise KeyError, TypeError or ValueError for other layouts."""
        return dict(row)

    def reason_to_drop(self, row: Row, split: Split) -> str | None:
        """Why a well-formed row must not be asked, None if it may be."""
        return None


def checked(model: type[_Model], row: Row, what: str) -> _Model:
    """A row as a pydantic model.

    Args:
        what: the name of the form, for the error.

    Raises:
        DataError: the row has another form.
    """
    try:
        return model.model_validate(row)
    except ValidationError as error:
        problems = "; ".join(f"{'.'.join(map(str, e['loc'])) or 'row'}: {e['msg']}" for e in error.errors())
        raise DataError(f"not a {what} row", got=problems) from error


def nats_per_token(answer: Answer) -> float:
    """Negative log-likelihood of the reference, in nats per token of it.

    Raises:
        EvaluationError: the system did not measure it.
    """
    if answer.target_nats is None or answer.target_tokens < 1:
        raise EvaluationError(
            "an answer lacks the likelihood of the reference",
            got=f"target_nats={answer.target_nats}, target_tokens={answer.target_tokens}",
            hint="This is a mistake in the system",
        )
    return answer.target_nats / answer.target_tokens
