"""The systems that were asked for, made from a pair."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from cache2cache.evaluate.heard import Listen, Mismatched, Own, Replaced
from cache2cache.evaluate.items import Item, System
from cache2cache.evaluate.names import Asked
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.routing import Embedder, Remembered, Router, Routing
from cache2cache.evaluate.systems import Alone, Forms, Fused, TextToText, ask_all, ask_background
from cache2cache.fuser.base import Fuser
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.pipeline import C2C

Statistics = Mapping[str, Sequence[FeatureStatistics]]
"""Task → one per sharer."""


@dataclass
class Ingredients:
    """All that systems are made of."""

    pair: C2C
    prefills: Prefills
    receiver_forms: Forms
    sharer_forms: Sequence[Forms]
    """One per sharer."""
    seed: int = 0
    message_tokens: int = 256
    routers: Mapping[str, Router] = field(default_factory=dict)
    """By kind of item; for routing."""
    partner: Mapping[str, Mapping[str, Item]] = field(default_factory=dict)
    """Task → id → the row whose sharer cache is heard instead; for mismatched."""
    statistics: Callable[[C2C], Statistics] = lambda pair: {}
    """Of a pair's sharers; for zeroed, random and without-sharer."""


@dataclass
class Systems:
    """Systems by name, in the order in which they answer."""

    by_name: dict[str, System]
    base: dict[str, str]
    """Name → what was asked for: `c2c-2` → `c2c`."""
    _remembered: Sequence[Remembered]
    _prefills: Prefills

    def clear(self) -> None:
        """Forget everything about the batch before."""
        self._prefills.clear()
        for system in self._remembered:
            system.clear()


def build(of: Ingredients, asked: Sequence[Asked]) -> Systems:
    """The systems and controls that were asked for.

    With several sharers there is one system `sharer`, `sharer-2`, … for each, `c2c` lets all of them speak and `c2c-1`,
    `c2c-2`, … one at a time.
    """
    unit = of.pair.receiver
    receiver = Alone("receiver", unit, of.receiver_forms, of.prefills, unit, sharer=False)
    sharers = [
        Remembered(Alone(numbered("sharer", i), lm, forms, of.prefills, unit, sharer=True))
        for i, (lm, forms) in enumerate(zip(of.pair.sharers, of.sharer_forms, strict=True))
    ]
    alone = Remembered(receiver)
    by_name, base = {}, {}
    for one in asked:
        for system in _made(one, of, receiver, alone, sharers):
            by_name[system.name], base[system.name] = system, one.name
    return Systems(by_name, base, [alone, *sharers], of.prefills)


def _made(one: Asked, of: Ingredients, receiver: Alone, alone: System, sharers: Sequence[System]) -> Iterator[System]:
    pair, prefills = of.pair, of.prefills

    def fused(listen: Listen, pair: C2C = pair) -> Fused:
        return Fused(one.name, pair, prefills, listen)

    match one.name:
        case "receiver":
            yield alone
        case "sharer":
            yield from sharers
        case "t2t":
            yield TextToText(one.name, receiver, pair.sharers, ask_background, of.message_tokens)
        case "t2t-fair":
            yield TextToText(one.name, receiver, pair.sharers, ask_all, of.message_tokens)
        case "routing":
            embed = Embedder(C2C(pair.receiver), prefills)
            yield Routing(one.name, of.routers, embed, alone, sharers[0], of.receiver_forms)
        case "c2c":
            yield fused(Own(pair, prefills))
            if len(pair.sharers) > 1:
                for i in range(len(pair.sharers)):
                    yield Fused(f"c2c-{i + 1}", pair, prefills, Own(pair, prefills), [i])
        case "mismatched":
            yield fused(Mismatched(pair, prefills, of.partner))
        case "zeroed" | "random":
            yield fused(Replaced(of.statistics(pair), noise=one.name == "random", seed=of.seed))
        case "self":
            same = C2C(pair.receiver, [pair.receiver], [Fuser.from_pretrained(str(one.fuser))])
            yield fused(Own(same, prefills), same)
        case "without-sharer":
            silent = C2C(pair.receiver, [pair.sharers[0]], [Fuser.from_pretrained(str(one.fuser))])
            yield fused(Replaced(of.statistics(silent), noise=False, seed=of.seed), silent)


def numbered(name: str, i: int) -> str:
    """`sharer` for the first, `sharer-2` for the second."""
    return name if i == 0 else f"{name}-{i + 1}"
