"""Work that is only worth doing while whoever asked is still there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, TypeVar

from starlette.requests import Request

T = TypeVar("T")


class ClientGoneError(Exception):
    """Whoever asked has closed the connection."""


async def while_present(request: Request, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
    """The result of `work`, which is cancelled when the client leaves. The request's body must have been read.

    Args:
        timeout: seconds after which it is cancelled as well.

    Raises:
        ClientGoneError: it left first.
        TimeoutError: it took too long.
    """
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        done, _ = await asyncio.wait({working, leaving}, timeout=timeout, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in (working, leaving):
            if not task.done():
                task.cancel()
        await asyncio.wait({working, leaving})
    if working in done:
        return working.result()
    raise ClientGoneError if leaving in done else TimeoutError


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
