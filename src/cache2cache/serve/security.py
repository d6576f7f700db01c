"""Who may ask, and how much they may send: ASGI middleware that knows nothing of what is asked."""

from __future__ import annotations

import asyncio
from collections.abc import Collection

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache2cache.serve.keys import Keys
from cache2cache.serve.problems import problem

_DISCARDED = 8
"""How many times the largest body is read of one that is too large, and thrown away."""


class Authentication:
    """Lets in those who send `Authorization: Bearer <key>` with one of the keys.

    Args:
        open_paths: what anybody may ask for, such as `/health`.
    """

    def __init__(self, app: ASGIApp, keys: Keys, open_paths: Collection[str] = ()):
        self._app, self._keys, self._open = app, keys, frozenset(open_paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan" or scope["path"] in self._open or self._may(scope):
            await self._app(scope, receive, send)
            return
        refused = problem(
            401, "a valid key is needed", "authentication_error", code="invalid_api_key",
            headers={"WWW-Authenticate": "Bearer"},
        )  # fmt: skip
        await refused(scope, receive, send)

    def _may(self, scope: Scope) -> bool:
        presented = Headers(scope=scope).getlist("authorization")
        scheme, _, key = presented[0].partition(" ") if len(presented) == 1 else ("", "", "")
        return scheme.lower() == "bearer" and self._keys.accept(key.strip())


class BodyLimit:
    """Hands on bodies that are complete and not too large. Said or not how large it is, no more of one is held.

    Args:
        max_bytes: of one body.
        seconds: that a body may take to arrive, so that nobody holds a place with one that never ends.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, seconds: float = 30.0):
        self._app, self._max_bytes, self._seconds = app, max_bytes, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        said = Headers(scope=scope).get("content-length", "0")
        try:
            allowed = self._max_bytes if self._fits(said) else -1
            body = await asyncio.wait_for(self._body(receive, allowed), self._seconds)
        except TimeoutError:
            await problem(408, "the body did not arrive in time", code="timeout")(scope, receive, send)
            return
        except _GoneError:
            return
        if body is None:
            too_large = problem(
                413, f"the request is too large; allowed: up to {self._max_bytes:,} bytes", code="request_too_large",
                headers={"Connection": "close"},
            )  # fmt: skip
            await too_large(scope, receive, send)
            return
        handed_on = False

        async def replayed() -> Message:
            nonlocal handed_on
            if handed_on:
                return await receive()  # the next thing that can come is that the client has gone
            handed_on = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replayed, send)

    def _fits(self, said: str) -> bool:
        return said.isdecimal() and len(said) < 20 and int(said) <= self._max_bytes

    async def _body(self, receive: Receive, allowed: int) -> bytes | None:
        """All of it; None if it is larger than allowed.

        What is too large is read on, within bounds, but not held: the connection will be closed, and who is still sending
        then never reads why.
        """
        parts: list[bytes] = []
        size, more = 0, True
        while more and size <= _DISCARDED * self._max_bytes:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _GoneError
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > allowed:
                parts.clear()
            more = message.get("more_body", False)
        return b"".join(parts) if size <= allowed else None


class _GoneError(Exception):
    """Whoever was sending has left."""
