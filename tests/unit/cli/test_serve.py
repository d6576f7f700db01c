"""`c2c serve`: what its options reach, and what it refuses before anything is loaded."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path
from typing import Any

import pytest
from starlette.testclient import TestClient

from cache2cache.cli import app
from cache2cache.cli.listening import bind, only_this_machine, url
from cache2cache.errors import ModelError
from cache2cache.serve.admission import Limits
from cache2cache.serve.embedded import TransformersEngine
from cache2cache.serve.queued import QueuedEngine
from cache2cache.serve.server import Server
from cache2cache.serve.vllm.engine import VllmEngine
from cache2cache.serve.worker import Worker

KEY = "a-key-that-nobody-guesses"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]) -> dict[str, Any]:
    """Keeps the server from running; what it would have run is in the dict, and what was loaded."""
    real = TransformersEngine.__init__

    def engine(self: TransformersEngine, pair: Any, limits: Limits, **options: Any) -> None:
        asked["engine"] = limits, options
        real(self, pair, limits, **options)

    def serve(self: Server, sockets: list[socket.socket]) -> None:
        asked.update(app=self.config.app, sockets=sockets)

    monkeypatch.setattr(TransformersEngine, "__init__", engine)
    monkeypatch.setattr(Server, "run", serve)
    monkeypatch.setattr("cache2cache.serve.logs.to_stderr", lambda: None)
    return asked


def c2c(*arguments: str) -> int:
    """Exit code of `c2c serve`."""
    with pytest.raises(SystemExit) as end:
        app(["serve", "--port", "0", *arguments])
    return int(end.value.code or 0)


def test_the_demo_pair_for_this_machine_by_default(run: dict[str, Any]):
    assert c2c() == 0
    assert (run["receiver"], run["sharers"], run["fusers"]) == ("smollm2-135m", ["qwen2.5-coder-1.5b"], ["demo"])
    assert run["sockets"][0].getsockname()[0] == "127.0.0.1"
    assert run["engine"] == (Limits(16, 64, None, 1024), {"prefix_bytes": 0})
    with TestClient(run["app"]) as client:
        models = client.get("/v1/models").json()["data"]
    assert models[0]["c2c"]["fusers"] == ["demo"]
    assert len(models) == 3


def test_options_reach_the_engine_and_the_server(run: dict[str, Any], tmp_path: Path):
    keys = tmp_path / "keys"
    keys.write_text(f"{KEY}\n")
    limits = "--max-batch 2 --max-waiting 7 --max-new-tokens 4 --cache-memory 0.5 --prefix-memory 2 --max-choices 5"
    assert c2c("-r", "r", "-s", "s", "-f", "/home/me/f", "--api-key-file", str(keys), *limits.split()) == 0
    assert run["engine"] == (Limits(2, 7, 1 << 29, 4), {"prefix_bytes": 1 << 31})
    with TestClient(run["app"]) as client:
        assert client.get("/v1/models").status_code == 401
        client.headers["Authorization"] = f"Bearer {KEY}"
        models = client.get("/v1/models").json()["data"]
        assert models[0]["c2c"]["fusers"] == ["f"], "folders are nobody's business"
        body = {"model": models[1]["id"], "messages": [{"role": "user", "content": "Hi"}], "n": 6}
        assert "up to 5" in client.post("/v1/chat/completions", json=body).json()["error"]["message"]


def test_keys_from_the_environment(run: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("C2C_API_KEYS", KEY)
    assert c2c("--host", "0.0.0.0") == 0
    with TestClient(run["app"]) as client:
        assert client.get("/v1/models").status_code == 401


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (["--host", "0.0.0.0"], 2, "lets other machines in"),
        (["--host", "203.0.113.1", "--api-key-file", "KEYS"], 2, "cannot listen at 203.0.113.1:0"),
        (["--api-key-file", "SHORT"], 1, "at least 16"),
        (["--api-key-file", "EMPTY"], 1, "no keys"),
        (["--api-key-file", "MISSING"], 1, "cannot be read"),
        (["--port", "70000"], 2, "--port"),
        (["--max-batch", "0"], 2, "max-batch"),
        (["--cache-memory", "0"], 2, "cache-memory"),
        (["--timeout", "0"], 2, "timeout"),
        (["-r", "r", "-s", "s"], 2, "needs one --fuser"),
        (["--sharer-timeout", "3"], 2, "http://"),
        (["--vllm-option", "enforce_eager=true"], 2, "needs --engine vllm"),
    ],
)
def test_what_is_refused(
    run: dict[str, Any],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    said: str,
):
    for name, text in (("KEYS", KEY), ("SHORT", "short"), ("EMPTY", "\n")):
        (tmp_path / name).write_text(text)
    placed = [str(tmp_path / part) if part.isupper() else part for part in arguments]
    assert c2c(*placed) == code
    assert said in capsys.readouterr().err
    assert "app" not in run


class TestVllm:
    @pytest.fixture
    def installed(self, run: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
        """As if vLLM were installed."""

        def engine(self: VllmEngine, pair: Any, limits: Limits, **options: Any) -> None:
            run["vllm"] = limits, options
            QueuedEngine.__init__(self, pair, Worker(pair, limits, 0), limits.max_new_tokens)

        monkeypatch.setattr("cache2cache.cli.serve.need", lambda *_: None)
        monkeypatch.setattr(VllmEngine, "__init__", engine)
        return run

    def test_its_options_reach_it(self, installed: dict[str, Any]):
        options = ["enforce_eager=true", "tensor_parallel_size=2", "kv_cache_dtype=fp8", 'x={"y": "="}']
        given = [part for option in options for part in ("--vllm-option", option)]
        assert c2c("--engine", "vllm", "--max-batch", "3", "--cache-memory", "0.5", *given) == 0
        reached = {"enforce_eager": True, "tensor_parallel_size": 2, "kv_cache_dtype": "fp8", "x": {"y": "="}}
        assert installed["vllm"] == (Limits(3, 64, 1 << 29, 1024), {"options": reached})

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["--vllm-option", "enforce_eager"], "NAME=VALUE"),
            (["--vllm-option", "=1"], "NAME=VALUE"),
            (["--prefix-memory", "1"], "--engine transformers"),
        ],
    )
    def test_what_is_refused(
        self, installed: dict[str, Any], capsys: pytest.CaptureFixture[str], arguments: list[str], said: str
    ):
        assert c2c("--engine", "vllm", *arguments) == 2
        assert said in " ".join(capsys.readouterr().err.replace("│", "").split())
        assert "receiver" not in installed, "told before anything is loaded"

    def test_without_it(self, run: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
        there = importlib.util.find_spec
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None if name == "vllm" else there(name))
        assert c2c("--engine", "vllm") == 1
        assert "cache2cache[vllm]" in " ".join(capsys.readouterr().err.split())
        assert "receiver" not in run


def test_an_engine_that_cannot_start(
    asked: dict[str, Any], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    async def start(_: TransformersEngine) -> None:
        raise ModelError("it computes something else", got=7)

    monkeypatch.setattr(TransformersEngine, "start", start)
    monkeypatch.setattr("cache2cache.serve.logs.to_stderr", lambda: None)
    assert c2c() == 4
    assert capsys.readouterr().err == "error: it computes something else; got 7\n"


def test_a_port_that_is_taken(run: dict[str, Any], capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = str(other.getsockname()[1])
        assert c2c("--port", port) == 2
    assert f"127.0.0.1:{port}" in capsys.readouterr().err
    assert "receiver" not in run, "told before anything is loaded"


@pytest.mark.parametrize(
    ("host", "local"),
    [
        ("127.0.0.1", True),
        ("127.1.2.3", True),
        ("::1", True),
        ("localhost", True),
        ("0.0.0.0", False),
        ("::", False),
        ("192.168.0.1", False),
        ("example.org", False),
    ],
)
def test_who_can_reach_an_address(host: str, local: bool):
    assert only_this_machine(host) is local


def test_nobody_can_connect_before_a_server_listens():
    with bind("127.0.0.1", 0) as bound:
        address = bound.getsockname()
        assert url(bound) == f"http://127.0.0.1:{address[1]}"
        with pytest.raises(ConnectionRefusedError), socket.create_connection(address):
            pass
