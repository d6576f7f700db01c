"""Work that ends when nobody waits for it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from starlette.requests import Request

from cache2cache.serve.presence import ClientGoneError, while_present


def request(left: asyncio.Event) -> Request:
    async def receive() -> Any:
        await left.wait()
        return {"type": "http.disconnect"}

    return Request({"type": "http"}, receive)


class Work:
    """Waits until it is told to end, and remembers being cancelled."""

    def __init__(self) -> None:
        self.go_on, self.begun, self.cancelled = asyncio.Event(), asyncio.Event(), False

    async def __call__(self) -> str:
        self.begun.set()
        try:
            await self.go_on.wait()
        except asyncio.CancelledError:
            self.cancelled = True
            raise
        return "done"


def test_the_result():
    async def run() -> str:
        work = Work()
        work.go_on.set()
        return await while_present(request(asyncio.Event()), work())

    assert asyncio.run(run()) == "done"


def test_errors_pass():
    async def fails() -> None:
        raise KeyError("x")

    async def run() -> None:
        await while_present(request(asyncio.Event()), fails())

    with pytest.raises(KeyError):
        asyncio.run(run())


@pytest.mark.parametrize(
    ("how", "error"),
    [("leaves", ClientGoneError), ("timeout", TimeoutError), ("cancelled", asyncio.CancelledError)],
)
def test_work_is_cancelled(how, error):
    async def run() -> bool:
        work, left = Work(), asyncio.Event()
        task = asyncio.create_task(while_present(request(left), work(), 0.01 if how == "timeout" else None))
        await work.begun.wait()
        if how == "leaves":
            left.set()
        if how == "cancelled":
            task.cancel()
        with pytest.raises(error):
            await task
        return work.cancelled

    assert asyncio.run(run())
