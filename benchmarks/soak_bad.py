"""Requests that a server must refuse, and what a refusal must look like."""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

CHAT = "/v1/chat/completions"
_JSON = {"Content-Type": "application/json"}
_FIELDS = {"message", "type", "param", "code"}


@dataclass(frozen=True)
class Bad:
    """A request, and what must be said to it."""

    name: str
    status: int
    code: str | None
    body: bytes = b""
    method: str = "POST"
    path: str = CHAT
    headers: Mapping[str, str] = field(default_factory=lambda: dict(_JSON))
    waits: bool = False
    """Whether it is looked at only when its turn has come, so that a full queue may refuse it first."""


def bad_requests(model: str, longest: int) -> list[Bad]:
    """One of each kind.

    Args:
        model: one that is served.
        longest: most tokens of an answer that the server writes.
    """
    good: dict[str, Any] = {"model": model, "messages": [{"role": "user", "content": "hello"}], "max_tokens": 2}

    def changed(**fields: Any) -> bytes:
        return json.dumps(good | fields).encode()

    without = {name: value for name, value in good.items() if name != "messages"}
    return [
        Bad("malformed JSON", 400, "invalid_json", changed()[:-1]),
        Bad("not UTF-8", 400, "invalid_json", b'{"model": "\xff\xfe"}'),
        Bad("not sent as JSON", 400, "invalid_json", changed(), headers={"Content-Type": "text/plain"}),
        Bad("no object", 400, "invalid_json", b"[]"),
        Bad("unknown field", 400, "unsupported_parameter", changed(frequency=1)),
        Bad("unserved field", 400, "unsupported_parameter", changed(tools=[{"type": "function"}])),
        Bad("missing field", 400, "missing_required_parameter", json.dumps(without).encode()),
        Bad("wrong type", 400, "invalid_value", changed(max_tokens="many")),
        Bad("out of range", 400, "invalid_value", changed(temperature=3)),
        Bad("unknown model", 404, "model_not_found", changed(model="nobody")),
        Bad("unknown sharer", 400, None, changed(sharers=["nobody"])),
        Bad("answer too long", 400, None, changed(max_tokens=longest + 1)),
        Bad(
            "prompt too long", 400, "context_length_exceeded",
            changed(messages=[{"role": "user", "content": "12 == " * 4_000}]), waits=True,
        ),
        Bad("wrong method", 405, None, method="GET"),
        Bad("unknown path", 404, None, path="/v1/embeddings", body=changed()),
        Bad("body too large", 413, "request_too_large", b" " * (5 << 20)),
    ]  # fmt: skip


def fault(status: int, code: str | None, got_status: int, body: bytes) -> str | None:
    """What is wrong with a refusal; None if it is as it should be: the status, and OpenAI's shape with the code."""
    try:
        error = json.loads(body)["error"]
    except (ValueError, LookupError, TypeError):
        return f"status {got_status} and no error in OpenAI's shape: {body[:200]!r}"
    if not isinstance(error, dict) or error.keys() != _FIELDS or not error["message"] or not error["type"]:
        return f"status {got_status} and an error of another shape: {body[:200]!r}"
    if (got_status, error["code"]) != (status, code):
        return f"status {got_status}, code {error['code']}, instead of {status}, {code}: {error['message']}"
    return None


async def break_off(port: int, dice: random.Random) -> None:
    """Connect, send a part of a request, or a whole one, and go without reading."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    body = b'{"model": "nobody", "messages": []}'
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    whole = head.encode() + body
    writer.write(whole[: dice.randint(1, len(whole))])
    await writer.drain()
    writer.transport.abort()
