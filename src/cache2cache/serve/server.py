"""Uvicorn, with a way to stop that loses no answer."""

from __future__ import annotations

import asyncio
import socket
from types import FrameType

import uvicorn
from fastapi import FastAPI

_IDLE = 75
"""Seconds after which an idle connection is closed. Clients built on httpx, OpenAI's among them, drop theirs after 5. A server
that does it in the same moment, as uvicorn does by default, closes some just when a request is sent."""

_CLOSING = 5
"""Seconds in which connections may still send what was written before the engine stopped."""


class Server(uvicorn.Server):
    """Serves an app with a `state.lifecycle`.

    At the first SIGTERM or SIGINT it drains: it is not ready any more, serves what runs, refuses what comes, and then
    ends as if nothing had been wrong. At the second it ends at once.
    """

    def __init__(self, app: FastAPI):
        # Requests are logged by the app, which knows their ids.
        config = uvicorn.Config(
            app, ws="none", log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=_CLOSING,
            timeout_keep_alive=_IDLE,
        )  # fmt: skip
        super().__init__(config)
        self._lifecycle = app.state.lifecycle
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None
        self._told = False

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn. Raises what keeps the app from starting, which uvicorn would only log."""
        await self._lifecycle.start()
        await super().startup(sockets)
        self._loop = asyncio.get_running_loop()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called on a signal, at any moment."""
        if self._loop is None:  # there is nothing to drain before the start
            super().handle_exit(sig, frame)
        elif self._told:
            self.should_exit = self.force_exit = True
        else:
            self._told = True
            self._loop.call_soon_threadsafe(self._drain)

    def _drain(self) -> None:
        self._draining = asyncio.create_task(self._lifecycle.drain())
        self._draining.add_done_callback(self._drained)

    def _drained(self, _: asyncio.Task[None]) -> None:
        self.should_exit = True
