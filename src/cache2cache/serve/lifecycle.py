"""When a server takes requests: from the moment its engine can answer until it is told to stop."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from cache2cache.serve.engine import Engine
from cache2cache.serve.settings import ServeSettings


class Lifecycle:
    """Starts an engine and stops it."""

    def __init__(self, engine: Engine, settings: ServeSettings):
        self._engine, self._settings = engine, settings
        self._drained: asyncio.Task[None] | None = None
        self.ready = False
        """Whether new requests should be sent here."""

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """The time of one server."""
        await self._engine.start()
        self.ready = True
        try:
            yield
        finally:
            await self.drain()

    async def drain(self) -> None:
        """Be not ready any more, serve on until that has been noticed, then let the engine finish what it has."""
        self.ready = False
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        await asyncio.sleep(self._settings.notice)
        await self._engine.stop(self._settings.grace)
