"""Who may ask, and how much they may send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import pytest

from cache2cache.serve.keys import Keys
from cache2cache.serve.security import Authentication, BodyLimit

KEY, OTHER = "k" * 20, "o" * 20


async def echo(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the body that arrives."""
    message = await receive()
    assert not message["more_body"]
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": message["body"]})


def call(app: Any, *, headers: Sequence[tuple[str, str]] = (), parts: Sequence[bytes] = (b"",), path: str = "/v1/x"):
    """Status, headers and body of one response; None if there is none."""
    scope = {
        "type": "http", "method": "POST", "path": path,
        "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in headers],
    }  # fmt: skip
    messages = [{"type": "http.request", "body": part, "more_body": i < len(parts) - 1} for i, part in enumerate(parts)]
    sent: list[Any] = []

    async def receive() -> Any:
        return messages.pop(0) if messages else {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        sent.append(message)

    asyncio.run(app(scope, receive, send))
    if not sent:
        return None
    body = b"".join(m.get("body", b"") for m in sent)
    return sent[0]["status"], {k.decode(): v.decode() for k, v in sent[0]["headers"]}, body


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ([("Authorization", f"Bearer {KEY}")], 200),
        ([("authorization", f"bearer  {OTHER}")], 200),
        ([], 401),
        ([("Authorization", "")], 401),
        ([("Authorization", "Bearer")], 401),
        ([("Authorization", KEY)], 401),
        ([("Authorization", f"Basic {KEY}")], 401),
        ([("Authorization", f"Bearer {KEY}x")], 401),
        ([("Authorization", f"Bearer {KEY[:-1]}")], 401),
        ([("Authorization", f"Bearer {KEY} {OTHER}")], 401),
        ([("Authorization", "Bearer ü" + "k" * 20)], 401),
        ([("Authorization", f"Bearer {KEY}"), ("Authorization", f"Bearer {OTHER}")], 401),
        ([("X-Api-Key", KEY)], 401),
    ],
)
def test_only_bearers_of_a_key_are_let_in(headers, status):
    app = Authentication(echo, Keys([KEY, OTHER]), open_paths=["/health"])
    got, sent, body = call(app, headers=headers, parts=[b"hi"])
    assert got == status
    if status == 401:
        assert sent["www-authenticate"] == "Bearer"
        assert json.loads(body)["error"]["type"] == "authentication_error"
        assert KEY.encode() not in body


@pytest.mark.parametrize(
    ("path", "status"), [("/health", 200), ("/health/", 401), ("/healthy", 401), ("//health", 401)]
)
def test_open_paths_are_exactly_those(path, status):
    assert call(Authentication(echo, Keys([KEY]), ["/health"]), path=path)[0] == status


def test_a_websocket_is_not_a_way_around():
    reached = []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    async def run() -> None:
        scope = {"type": "websocket", "path": "/v1/x", "headers": []}
        with pytest.raises(Exception):  # noqa: B017  however a server closes it
            await Authentication(app, Keys([KEY]))(scope, None, None)  # type: ignore[arg-type]

    asyncio.run(run())
    assert not reached


@pytest.mark.parametrize(
    ("said", "parts", "status"),
    [
        (None, [b"12345"], 200),
        (None, [b"12", b"", b"345"], 200),
        (None, [b""], 200),
        ("5", [b"12345"], 200),
        (None, [b"123456"], 413),
        (None, [b"123", b"456"], 413),
        (None, [b"1"] * 6, 413),
        ("6", [b"123456"], 413),
        ("6", [b"1"], 413),
        ("5", [b"123456"], 413),  # whatever was said, it is counted
        ("9" * 30, [b"1"], 413),
        ("-1", [b"1"], 413),
        ("x", [b"1"], 413),
    ],
)
def test_bodies_are_bounded_said_or_not(said, parts, status):
    headers = [] if said is None else [("Content-Length", said)]
    got, sent, body = call(BodyLimit(echo, 5), headers=headers, parts=parts)
    assert got == status
    if status == 200:
        assert body == b"".join(parts)
    else:
        assert json.loads(body)["error"]["code"] == "request_too_large"
        assert sent["connection"] == "close"


def test_a_body_without_an_end_is_not_read_for_ever():
    taken = []

    async def receive() -> Any:
        taken.append(1)
        return {"type": "http.request", "body": b"x" * 10, "more_body": True}

    async def send(_: Any) -> None: ...

    asyncio.run(BodyLimit(echo, 25)({"type": "http", "method": "POST", "path": "/", "headers": []}, receive, send))
    assert 3 < len(taken) < 30


def test_who_sends_too_much_is_heard_out_before_it_is_told():
    """A connection that is closed while somebody sends is reset, and what was said to them is lost."""
    parts = [{"type": "http.request", "body": b"x" * 10, "more_body": more} for more in (True, True, True, True, False)]

    async def receive() -> Any:
        return parts.pop(0)

    async def send(_: Any) -> None:
        assert not parts

    scope = {"type": "http", "method": "POST", "path": "/", "headers": [(b"content-length", b"50")]}
    asyncio.run(BodyLimit(echo, 25)(scope, receive, send))
    assert not parts


def test_a_body_that_never_ends_is_given_up():
    statuses = []

    async def receive() -> Any:
        await asyncio.Future()

    async def send(message: Any) -> None:
        statuses.append(message.get("status"))

    scope = {"type": "http", "method": "POST", "path": "/", "headers": []}
    asyncio.run(BodyLimit(echo, 25, seconds=0.01)(scope, receive, send))
    assert statuses[0] == 408


def test_whoever_leaves_before_the_end_is_not_answered():
    assert call(BodyLimit(echo, 25), parts=[]) is None


def test_the_app_still_hears_that_the_client_has_gone():
    async def app(scope, receive, send):
        assert (await receive())["body"] == b"hi"
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": (await receive())["type"].encode()})

    assert call(BodyLimit(app, 25), parts=[b"hi"])[2] == b"http.disconnect"
