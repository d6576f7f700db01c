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
        self._open = False

    @property
    def alive(self) -> bool:
        """Whether it does what it is there for, or comes to an orderly end; otherwise it has to be started again."""
        return self._drained is not None or self._engine.alive

    @property
    def ready(self) -> bool:
        """Whether new requests should be sent here."""
        return self._open and self._engine.alive

    async def start(self) -> None:
        """Let the engine load what it needs, unless it has; raises what keeps it from answering."""
        if not self._open:
            await self._engine.start()
            self._open = True

    @asynccontextmanager
    async def running(self) -> AsyncGenerator[None, None]:
        """The time of one server."""
        await self.start()
        try:
            yield
        finally:
            await self.drain()

    async def drain(self) -> None:
        """Be not ready any more, serve on until that has been noticed, then let the engine finish what it has."""
        self._open = False
        if self._drained is None:
            self._drained = asyncio.create_task(self._drain())
        await asyncio.shield(self._drained)

    async def _drain(self) -> None:
        await asyncio.sleep(self._settings.notice)
        await self._engine.stop(self._settings.grace)
