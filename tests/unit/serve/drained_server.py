"""A server for `test_server.py`, which sends it signals: an answer goes on for as long as a file is missing.

Arguments: that file, seconds of notice, seconds of grace. Prints its address once it listens.
"""

import asyncio
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from cache2cache.cli.listening import bind, url
from cache2cache.errors import BusyError
from cache2cache.serve.app import create_app
from cache2cache.serve.engine import Event, Load, Request, Usage
from cache2cache.serve.server import Server
from cache2cache.serve.settings import ServeSettings


class Patient:
    """An engine that stops as engines do."""

    receiver, sharers, alone, max_waiting, alive = "small", (), (), 64, True

    def __init__(self, end: Path):
        self._end, self._running, self._stopping, self._cut = end, 0, False, False

    async def start(self) -> None:
        pass

    async def submit(self, request: Request) -> AsyncGenerator[Event, None]:
        if self._stopping:
            raise BusyError("the server is about to stop")
        self._running += 1
        yield Event("begun", (1,), usage=Usage(1, (), 0, 0))
        while not self._end.exists():
            if self._cut:
                raise BusyError("cut off")
            await asyncio.sleep(0.01)
        self._running -= 1
        yield Event(" ended", (2,), finish="stop")

    def load(self) -> Load:
        return Load(running=self._running)

    async def stop(self, grace: float) -> None:
        self._stopping = True
        try:
            async with asyncio.timeout(grace):
                while self._running:
                    await asyncio.sleep(0.01)
        except TimeoutError:
            self._cut = True


if __name__ == "__main__":
    end, notice, grace = Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3])
    bound = bind("127.0.0.1", 0)
    server = Server(create_app(Patient(end), ServeSettings(notice=notice, grace=grace)))
    sys.stdout.write(f"{url(bound)}\n")
    sys.stdout.flush()
    server.run([bound])
