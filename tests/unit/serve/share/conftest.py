"""Sharers as services, with somebody in between who may meddle with what they say."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import pytest

from cache2cache.cli.listening import bind, url
from cache2cache.models.load import LanguageModel
from cache2cache.serve.node import NodeSettings, create_node
from cache2cache.serve.remote import RemoteOptions, RemoteSharer
from cache2cache.serve.server import Server


@dataclass(frozen=True)
class Said:
    """A whole response."""

    status: int
    headers: list[tuple[bytes, bytes]]
    body: bytes


@dataclass
class Node:
    """A service that is running, and what a test does to its answers to requests for caches."""

    app: Any
    address: str = ""
    meddle: Callable[[Said], Said | None] = lambda said: said
    """None breaks the connection off."""
    trickle: float = 0.0
    """Seconds between one byte and the next."""
    asked: list[bytes] = field(default_factory=list)
    """Bodies of the requests for caches."""
    seen: list[str] = field(default_factory=list)
    """Paths of all requests."""

    @property
    def state(self) -> Any:
        return self.app.state

    def sharer(self, **options: Any) -> RemoteSharer:
        return RemoteSharer.connect(self.address, RemoteOptions(**{"cooldown": 0.0, **options}))

    def undisturbed(self) -> None:
        self.meddle, self.trickle = (lambda said: said), 0.0
        self.asked.clear()
        self.seen.clear()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        self.seen.append(scope["path"])
        if scope["method"] != "POST":
            await self.app(scope, receive, send)
            return
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.asked.append(body)
        messages: list[Any] = [{"type": "http.request", "body": body, "more_body": False}]

        async def replayed() -> Any:
            return messages.pop() if messages else await asyncio.Future()

        sent: list[Any] = []

        async def kept(message: Any) -> None:
            sent.append(message)

        await self.app(scope, replayed, kept)
        said = Said(sent[0]["status"], sent[0]["headers"], b"".join(m.get("body", b"") for m in sent))
        meddled = self.meddle(said)
        if meddled is None:  # a server closes the connection when an app fails in the middle of an answer
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": said.body[:1], "more_body": True})
            raise ConnectionAbortedError("meddled with")
        headers = [(name, value) for name, value in meddled.headers if name != b"content-length"]
        await send({"type": "http.response.start", "status": meddled.status, "headers": headers})
        parts = [meddled.body] if not self.trickle else [bytes([b]) for b in meddled.body]
        for part in parts:
            await asyncio.sleep(self.trickle)
            await send({"type": "http.response.body", "body": part, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@contextmanager
def running(lm: LanguageModel, settings: NodeSettings | None = None, port: int = 0) -> Iterator[Node]:
    """A service of a model at an address of its own, for as long as the block lasts."""
    node, bound = Node(create_node(lm, settings)), bind("127.0.0.1", port)
    node.address = url(bound)
    server = Server(node)  # type: ignore[arg-type]
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    try:
        yield node
    finally:
        server.should_exit = True
        thread.join()
        bound.close()


@pytest.fixture(name="running")
def _running():
    """Makes a service of a model."""
    return running


@pytest.fixture(scope="module")
def shared(sharer: LanguageModel) -> Iterator[Node]:
    with running(sharer) as node:
        yield node


@pytest.fixture
def node(shared: Node) -> Iterator[Node]:
    """A service of the tiny sharer that lets everybody in, undisturbed."""
    shared.undisturbed()
    yield shared
    shared.undisturbed()


@pytest.fixture
def changed():
    """Makes a meddler from what is to be different about a response."""

    def make(**fields: Any) -> Callable[[Said], Said]:
        return lambda said: replace(said, **{k: v(getattr(said, k)) if callable(v) else v for k, v in fields.items()})

    return make
