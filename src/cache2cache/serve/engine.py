"""What an engine is: something that answers requests, token by token, and whose answers do not depend on one another."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from typing import Literal, Protocol

from cache2cache.types import Conversation

Finish = Literal["stop", "length"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn."""

    max_tokens: int | None = None
    """None: as far as the context has room, at most the engine's own limit."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    seed: int = 0
    """Of the draws of this request alone; the same seed gives the same answer whatever else is in the batch."""
    stop: tuple[str, ...] = ()
    """Texts before which the answer ends; they are not part of it."""
    logprobs: int | None = None
    """How many of the likeliest tokens to report at each step, 0 for the chosen one only; None reports nothing."""


@dataclass(frozen=True)
class Request:
    """One answer to write."""

    id: str
    prompt: Conversation | str
    """Messages, or text that is read as it is."""
    sharers: tuple[int, ...]
    """Which sharers speak; empty is the receiver alone."""
    alone: int | None = None
    """Let this sharer answer by itself instead of the receiver."""
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class TokenLogprob:
    """A token and how likely it was, after temperature."""

    id: int
    text: str
    logprob: float


@dataclass(frozen=True)
class Usage:
    """Tokens and bytes of one request."""

    prompt_tokens: int
    """Read by whoever answers."""
    sharer_tokens: tuple[int, ...]
    """Read by each sharer that spoke."""
    cached_tokens: int
    """Of the prompt tokens, those that were not read again because an earlier request had."""
    cache_bytes: int
    """Of sharer cache that went into the fusion."""


@dataclass(frozen=True)
class Event:
    """What an answer gains at one step. The last event of an answer has a `finish`."""

    text: str
    """New text; may be empty while a character is incomplete or a stop text may still follow."""
    tokens: tuple[int, ...] = ()
    logprob: TokenLogprob | None = None
    top: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    usage: Usage | None = None
    """With the first event."""
    degraded: tuple[int, ...] = ()
    """Sharers that should have spoken and could not, where the deployment allows that; with the first event."""


@dataclass
class Load:
    """How busy an engine is."""

    waiting: int = 0
    running: int = 0
    cache_bytes: int = 0
    """Held by running requests and the prefix cache."""
    counters: dict[str, float] = field(default_factory=dict)
    """Sums since the start, by name: seconds of each stage (`seconds_sharer_prefill`, …), tokens, prefix hits, bytes."""


class Engine(Protocol):
    """Answers requests. All methods are called on one event loop."""

    @property
    def sharers(self) -> Sequence[str]:
        """Names of the sharers, by which `Request.sharers` counts."""
        ...

    @property
    def alone(self) -> Sequence[int]:
        """Which sharers can answer by themselves: those whose weights are here."""
        ...

    @property
    def receiver(self) -> str:
        """Name of the receiver."""
        ...

    @property
    def max_waiting(self) -> int:
        """Most requests that wait. So many are taken at the same moment by an engine that is idle; more may be refused."""
        ...

    @property
    def alive(self) -> bool:
        """Whether it can answer at all. Once it has died it does not come back."""
        ...

    async def start(self) -> None:
        """Load what is needed; returns once requests can be answered."""
        ...

    def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        """Answer one request. Closing the generator cancels it.

        Raises (at the first step):
            BusyError: the queue is full.
            C2CError: the request cannot be answered.
        """
        ...

    def load(self) -> Load:
        """How busy it is."""
        ...

    async def stop(self, grace: float) -> None:
        """Take nothing new, let running requests end for `grace` seconds, then cancel them."""
        ...
