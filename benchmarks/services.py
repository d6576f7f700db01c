"""Servers as processes of their own, which a benchmark starts, asks, kills and stops."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Self

C2C = (sys.executable, "-m", "cache2cache")
_POLL = 0.1


class Service:
    """One server. As a context manager it is started and ready inside, and dead outside.

    Args:
        command: that runs it, its port included.
        log: file that its output is added to.
        ready: path that answers with 200 once it can be asked.
        patience: seconds that it may take until then.
    """

    def __init__(self, command: Sequence[str], port: int, log: Path, *, ready: str = "/ready", patience: float = 600):
        self.url, self.log = f"http://127.0.0.1:{port}", log
        self._command, self._ready, self._patience = list(command), ready, patience
        self.process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        self.start()
        try:
            self.wait()
        except BaseException:
            self.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Begin; returns at once."""
        # A session of its own, so that whatever it starts itself can be killed with it.
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log, start_new_session=True)

    def wait(self) -> None:
        """Until it is ready.

        Raises:
            RuntimeError: it ended, or takes too long.
        """
        deadline = time.monotonic() + self._patience
        while not self._answers():
            if self._running().poll() is not None or time.monotonic() > deadline:
                last = self.log.read_text("utf-8", "replace")[-2000:]
                raise RuntimeError(f"{' '.join(self._command)} is not ready; the end of its log:\n{last}")
            time.sleep(_POLL)

    def stop(self, patience: float) -> int | None:
        """Ask it to end; its exit status, None if it does not end."""
        self._running().send_signal(signal.SIGTERM)
        try:
            return self._running().wait(patience)
        except subprocess.TimeoutExpired:
            return None

    def kill(self) -> None:
        """End it, and all that it started, at once."""
        if self.process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self.process is not None, "not started"
        return self.process

    def _answers(self) -> bool:
        try:
            with urllib.request.urlopen(f"{self.url}{self._ready}", timeout=5) as response:
                return response.status == 200
        except (urllib.error.URLError, OSError):
            return False


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
