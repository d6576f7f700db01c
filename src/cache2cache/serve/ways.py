"""Ways of answering, each a model of the OpenAI API: the pair, its receiver alone, each sharer alone that can be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from cache2cache.errors import RequestError, UnknownModelError


@dataclass(frozen=True)
class Way:
    """Who answers, and who may be listened to."""

    id: str
    sharers: tuple[int, ...] = ()
    """Those that speak unless a request says otherwise."""
    alone: int | None = None
    """The sharer that answers by itself."""


class Ways:
    """All ways of a server, by id.

    The pair is `receiver+sharer`. A sharer that has the same name as another model is `name:index`.

    Args:
        alone: indices of the sharers that can answer by themselves.
    """

    def __init__(self, receiver: str, sharers: Sequence[str], alone: Sequence[int]):
        self.receiver = receiver
        often = Counter([receiver, *sharers])
        self.sharers = [name if often[name] == 1 else f"{name}:{i}" for i, name in enumerate(sharers)]
        """Ids of the sharers."""
        everyone = tuple(range(len(sharers)))
        pair = [Way("+".join([receiver, *sharers]), everyone)] if sharers else []
        ways = [*pair, Way(receiver), *(Way(self.sharers[i], alone=i) for i in alone)]
        self._ways = {way.id: way for way in ways}

    def __iter__(self) -> Iterator[Way]:
        return iter(self._ways.values())

    def find(self, model: str) -> Way:
        """The way that a request names.

        Raises:
            UnknownModelError: there is none of that name.
        """
        if model not in self._ways:
            raise UnknownModelError("this server has no such model", got=repr(model), allowed=", ".join(self._ways))
        return self._ways[model]

    def speaking(self, way: Way, asked: Sequence[str | int] | None) -> tuple[int, ...]:
        """Who speaks, in the order of the sharers.

        Args:
            asked: ids or indices; None leaves it to the way.

        Raises:
            RequestError: a sharer that is unknown or named twice, or a way that hears nobody.
        """
        if asked is None:
            return way.sharers
        indices = {name: i for i, name in enumerate(self.sharers)} | {i: i for i in range(len(self.sharers))}
        if unknown := [name for name in asked if name not in indices]:
            raise RequestError("no such sharer", got=unknown, allowed=self.sharers, field="sharers")
        speaking = sorted({indices[name] for name in asked})
        if len(speaking) < len(asked):
            raise RequestError("a sharer is named twice", got=list(asked), field="sharers")
        if speaking and not way.sharers:
            raise RequestError(
                f"{way.id} answers alone", got=list(asked), allowed="no sharers",
                hint="Ask for the pair", field="sharers",
            )  # fmt: skip
        return tuple(speaking)
