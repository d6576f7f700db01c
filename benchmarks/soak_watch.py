"""Somebody who looks at a server all the time: memory, health, queue, and what it logs."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
from services import Service
from soak_book import Book
from soak_memory import Memory

_EVERY = 0.5
_LOADS = ("c2c_waiting", "c2c_running", "c2c_cache_bytes")
_PATIENCE = 30.0
"""Seconds in which a server that nobody asks any more must have let go of everything."""


class Watch:
    """Looks twice a second.

    Args:
        memory: where samples go: one series for the server, one for each life of the sharer.
    """

    def __init__(self, server: Service, sharer: Service, book: Book, memory: Memory):
        self._server, self._sharer, self._book, self._memory = server, sharer, book, memory
        self._loads: list[dict[str, float]] = []

    async def look(self) -> None:
        """Until cancelled."""
        async with httpx2.AsyncClient(base_url=self._server.url, timeout=60) as client:
            while True:
                assert self._server.process is not None and self._sharer.process is not None
                self._memory.look("server", self._server.process.pid)
                if self._book.heard:
                    self._memory.look(f"sharer, life {len(self._book.outages) + 1}", self._sharer.process.pid)
                for path in ("/health", "/ready"):
                    if (status := (await client.get(path)).status_code) != 200:
                        self._book.violation(f"{path} says {status}")
                self._loads.append(loads((await client.get("/metrics")).text))
                await asyncio.sleep(_EVERY)

    async def until_idle(self) -> None:
        """Nobody asks any more: whatever is still held is a leak."""
        async with httpx2.AsyncClient(base_url=self._server.url, timeout=60) as client:
            deadline = self._book.now() + _PATIENCE
            while any((held := loads((await client.get("/metrics")).text)).values()):
                if self._book.now() > deadline:
                    self._book.violation(f"held by a server that nobody asks: {held}")
                    return
                await asyncio.sleep(_EVERY)

    def described(self) -> str:
        """How full the queue was."""
        waiting = [load["c2c_waiting"] for load in self._loads]
        running = [load["c2c_running"] for load in self._loads]
        return (
            f"{sum(waiting) / len(waiting):.1f} waited and {sum(running) / len(running):.1f} were answered on average, "
            f"{max(waiting):.0f} and {max(running):.0f} at most"
        )


def loads(metrics: str) -> dict[str, float]:
    """What a server holds, by metric, from Prometheus' text format."""
    values = dict(re.findall(r"^(\w+) (\S+)$", metrics, re.MULTILINE))
    return {name: float(values[name]) for name in _LOADS}


def log_faults(log: Path) -> Iterator[str]:
    """Errors among a log's JSON lines, and tracebacks among its other ones."""
    for line in log.read_text("utf-8", "replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            entry = None
        if isinstance(entry, dict) and entry.get("level") in ("error", "critical"):
            yield f"{entry['message']}: {entry.get('traceback', '')[-1500:]}"
        elif entry is None and "Traceback (most recent call last)" in line:
            yield line
