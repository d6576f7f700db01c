"""A scripted engine, and servers."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace
from typing import ClassVar

import pytest

from cache2cache.errors import BusyError
from cache2cache.serve.engine import Engine, Event, Load, Request, Usage

Step = Event | Exception | str
"""An event, an error, or `ScriptedEngine.WAIT` or `NEVER`."""

USAGE = Usage(prompt_tokens=7, sharer_tokens=(11, 13), cached_tokens=2, cache_bytes=1024)
"""Of an answer that hears both sharers; one that does not hears those that it asked for."""


@dataclass
class ScriptedEngine:
    """Says what a test tells it to say, and remembers what it was asked."""

    WAIT: ClassVar[str] = "wait"
    """A step of a script that lasts until the test sets `go_on`."""
    NEVER: ClassVar[str] = "never"
    """One that lasts until the answer is closed."""

    receiver: str = "small"
    sharers: Sequence[str] = ("big", "other")
    alone: Sequence[int] = (0, 1)
    max_waiting: int = 64
    alive: bool = True
    script: Callable[[Request], Sequence[Step]] = lambda _: ScriptedEngine.said("Hello", " there")
    asked: list[Request] = field(default_factory=list)
    cancelled: list[str] = field(default_factory=list)
    """Ids of requests that were closed before their end."""
    go_on: threading.Event = field(default_factory=threading.Event)
    counters: dict[str, float] = field(default_factory=lambda: {"seconds_decode": 1.5, "prefix_hits": 3.0})
    started: bool = False
    stopped_with: float | None = None

    @staticmethod
    def said(*texts: str, finish: str = "stop", usage: Usage = USAGE, degraded: tuple[int, ...] = ()) -> list[Step]:
        """An answer, one event per text."""
        events = [Event(text, (i,)) for i, text in enumerate(texts)]
        last = len(events) - 1
        return [
            Event(
                event.text,
                event.tokens,
                finish=finish if i == last else None,  # type: ignore[arg-type]
                usage=usage if i == 0 else None,
                degraded=degraded if i == 0 else (),
            )
            for i, event in enumerate(events)
        ]

    async def start(self) -> None:
        self.started = True

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if self.stopped_with is not None:
            raise BusyError("the server is about to stop")
        self.asked.append(request)
        try:
            for step in self.script(request):
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, str):
                    while step == self.NEVER or not self.go_on.is_set():
                        await asyncio.sleep(0.002)
                elif step.usage is USAGE:
                    heard = tuple(USAGE.sharer_tokens[i] for i in request.sharers)
                    yield replace(step, usage=replace(USAGE, sharer_tokens=heard))
                else:
                    yield step
        except (asyncio.CancelledError, GeneratorExit):
            self.cancelled.append(request.id)
            raise

    def load(self) -> Load:
        return Load(waiting=4, running=len(self.asked), cache_bytes=99, counters=dict(self.counters))

    async def stop(self, grace: float) -> None:
        self.stopped_with = grace


def until(condition: Callable[[], object], seconds: float = 20) -> None:
    """Wait for something that another thread does."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


@contextmanager
def served(engine: Engine, settings=None) -> Iterator[str]:
    """A real server of an engine; its address."""
    from cache2cache.cli.listening import bind, url
    from cache2cache.serve.app import create_app
    from cache2cache.serve.server import Server

    bound = bind("127.0.0.1", 0)
    server = Server(create_app(engine, settings))
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        until(lambda: server.started or not thread.is_alive())
        yield url(bound)
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@pytest.fixture
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def _live() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def address(_live: ScriptedEngine) -> Iterator[str]:
    """Of a real server, whose engine is `live`."""
    with served(_live) as url:
        yield url


@pytest.fixture
def live(_live: ScriptedEngine, address: str) -> Iterator[ScriptedEngine]:
    """An engine that is served at `address` and knows nothing of the tests before."""
    vars(_live).update(vars(ScriptedEngine()))
    yield _live
    _live.go_on.set()


@pytest.fixture(name="served")
def _serve() -> Callable[..., AbstractContextManager[str]]:
    """Makes a real server of an engine and settings."""
    return served


@pytest.fixture(name="until")
def _until() -> Callable[..., None]:
    return until
