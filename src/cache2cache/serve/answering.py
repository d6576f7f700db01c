"""Several answers at a time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from cache2cache.serve.engine import Engine, Event, Request


async def answers(
    engine: Engine, requests: Sequence[Request], deadline: float
) -> AsyncGenerator[tuple[int, Event], None]:
    """What all requests gain, as it comes, with the index of the request. Closing it cancels them.

    Args:
        deadline: when to give up, in the event loop's time.

    Raises:
        TimeoutError: the deadline has passed.
        Exception: the first that one of the answers ends with; the others are cancelled.
    """
    arrived: asyncio.Queue[tuple[int, Event] | Exception] = asyncio.Queue()

    async def write(index: int, request: Request) -> None:
        finish = None
        try:
            async with aclosing(engine.submit(request)) as events:
                async for event in events:
                    finish = event.finish
                    arrived.put_nowait((index, event))
            if finish is None:
                raise RuntimeError("the engine has left an answer without an end")
        except Exception as error:
            arrived.put_nowait(error)

    tasks = [asyncio.create_task(write(i, request)) for i, request in enumerate(requests)]
    try:
        left = len(requests)
        while left:
            async with asyncio.timeout_at(deadline):
                item = await arrived.get()
            if isinstance(item, Exception):
                raise item
            left -= item[1].finish is not None
            yield item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
