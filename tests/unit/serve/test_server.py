"""Signals: a server that is told to stop loses no answer."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import pytest
from fastapi import FastAPI

from cache2cache.serve.server import Server

SERVER = Path(__file__).parent / "drained_server.py"
BODY = {"model": "small", "messages": [{"role": "user", "content": "Hi"}], "stream": True}


@pytest.fixture
def end(tmp_path: Path) -> Path:
    """Answers end once this file exists."""
    return tmp_path / "end"


@pytest.fixture
def running(end: Path) -> Iterator[Callable[..., tuple[subprocess.Popen, httpx2.Client]]]:
    """Starts a server with seconds of notice and grace."""
    processes: list[subprocess.Popen] = []

    def start(notice: float, grace: float) -> tuple[subprocess.Popen, httpx2.Client]:
        arguments = [sys.executable, str(SERVER), str(end), str(notice), str(grace)]
        process = subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)
        processes.append(process)
        assert process.stdout is not None
        client = httpx2.Client(base_url=process.stdout.readline().strip(), timeout=30)
        return process, client

    yield start
    for process in processes:
        process.kill()
        process.communicate()


@contextmanager
def answering(client: httpx2.Client, until: Callable[..., None]) -> Iterator[Iterator[str]]:
    """The lines of an answer that has begun."""
    until(lambda: healthy(client))
    with client.stream("POST", "/v1/chat/completions", json=BODY) as response:
        lines = (line for line in response.iter_lines() if line)
        assert "begun" in next(lines)
        yield lines


def healthy(client: httpx2.Client) -> bool:
    try:
        return client.get("/health").status_code == 200
    except httpx2.TransportError:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_what_runs_is_answered(running: Callable, end: Path, until: Callable, number: signal.Signals):
    process, client = running(notice=0, grace=60)
    with answering(client, until) as lines:
        process.send_signal(number)
        until(lambda: client.get("/ready").status_code == 503)
        until(lambda: client.post("/v1/chat/completions", json=BODY).status_code == 503)
        assert client.get("/health").status_code == 200
        end.touch()
        assert [" ended" in next(lines), next(lines)] == [True, "data: [DONE]"]
    assert process.wait(30) == 0


def test_it_is_noticed_before_anything_is_refused(running: Callable, end: Path, until: Callable):
    process, client = running(notice=60, grace=60)
    with answering(client, until):
        process.send_signal(signal.SIGTERM)
        until(lambda: client.get("/ready").status_code == 503)
        with answering(client, until):
            pass
        process.send_signal(signal.SIGTERM)
        process.wait(30)


def test_what_does_not_end_is_cut_off_with_an_error(running: Callable, until: Callable):
    process, client = running(notice=0, grace=0.2)
    with answering(client, until) as lines:
        process.send_signal(signal.SIGTERM)
        assert '"code":"stopping"' in next(lines)
        assert list(lines) == []
    assert process.wait(30) == 0


def test_an_idle_connection_is_not_closed_while_a_client_may_still_use_it():
    """A server that closes it in the moment in which the client sends a request leaves that request without an answer."""
    app = FastAPI()
    app.state.lifecycle = None
    expiry = httpx2.Limits().keepalive_expiry
    assert expiry is not None and Server(app).config.timeout_keep_alive > 2 * expiry
