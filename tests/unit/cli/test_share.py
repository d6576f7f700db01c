"""`c2c share`, and the options of commands that listen to sharers elsewhere."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cache2cache.cli import app, share
from cache2cache.cli.listening import bind
from cache2cache.models.load import LanguageModel
from cache2cache.serve.keys import Keys
from cache2cache.serve.node import NodeSettings
from cache2cache.testing import random_fuser, tiny_pair

TOKEN, KEY = "t" * 20, "k" * 20
SECRETS = ("C2C_SHARE_TOKENS", "C2C_SHARE_KEY", "C2C_SHARER_TOKEN", "C2C_SHARER_KEY")
THERE = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def _no_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in SECRETS:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch, sharer: LanguageModel) -> dict:
    """What a service was started with, and where; it ends at once."""
    started: dict = {}

    def load(name: str, **options) -> LanguageModel:
        started.update(name=name, **options)
        return sharer

    def create_node(lm: LanguageModel, settings: NodeSettings) -> str:
        started["settings"] = settings
        return "app"

    class Server:
        def __init__(self, app: str):
            started["app"] = app

        def run(self, sockets) -> None:
            started["host"] = sockets[0].getsockname()[0]
            sockets[0].close()

    monkeypatch.setattr("cache2cache.models.load.load", load)
    monkeypatch.setattr("cache2cache.serve.node.create_node", create_node)
    monkeypatch.setattr("cache2cache.serve.server.Server", Server)
    monkeypatch.setattr("cache2cache.serve.logs.to_stderr", lambda: None)
    return started


def run(*args: str):
    return CliRunner().invoke(app, list(args))


def test_by_default_only_this_machine_may_ask(started):
    assert run("share", "tiny", "--port", "0").exit_code == 0
    assert (started["name"], started["host"], started["app"]) == ("tiny", "127.0.0.1", "app")
    settings = started["settings"]
    assert (settings.keys, settings.signing_key) == (None, None)
    assert settings == NodeSettings()


def test_options_arrive(started, tmp_path: Path):
    tokens, key = tmp_path / "tokens", tmp_path / "key"
    tokens.write_text(f"{TOKEN}\n")
    key.write_text(f"{KEY}\n")
    done = run(
        *("share", "tiny", "--host", "0.0.0.0", "--port", "0", "--token-file", str(tokens), "--key-file", str(key)),
        *("--max-rows", "3", "--max-tokens", "50", "--max-waiting", "5", "--timeout", "7", "--dtype", "bfloat16"),
    )
    assert done.exit_code == 0, done.output
    settings = started["settings"]
    assert settings.keys.accept(TOKEN)
    assert (settings.signing_key, settings.timeout) == (KEY.encode(), 7)
    assert (settings.max_rows, settings.max_tokens, settings.max_waiting) == (3, 50, 5)
    assert (started["dtype"], started["host"]) == ("bfloat16", "0.0.0.0")
    assert TOKEN not in repr(settings)
    assert KEY not in repr(settings)


def test_others_need_a_token(started, monkeypatch):
    refused = run("share", "tiny", "--host", "0.0.0.0", "--port", "0")
    assert refused.exit_code == 2
    assert "give --token-file" in refused.output
    assert "settings" not in started
    monkeypatch.setenv("C2C_SHARE_TOKENS", TOKEN)
    assert run("share", "tiny", "--host", "0.0.0.0", "--port", "0").exit_code == 0
    assert isinstance(started["settings"].keys, Keys)


def test_a_token_that_is_too_short(started, monkeypatch):
    monkeypatch.setenv("C2C_SHARE_TOKENS", "short")
    done = run("share", "tiny", "--port", "0")
    assert (done.exit_code, "a key cannot be used" in done.output) == (1, True)


def test_a_port_that_is_taken_is_told_before_anything_is_loaded(started):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        done = run("share", "tiny", "--port", str(taken.getsockname()[1]))
    assert (done.exit_code, "cannot listen" in done.output) == (2, True)
    assert "name" not in started


# --- those who listen ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [("generate", "hi"), ("chat",)])
def test_options_for_sharers_elsewhere_arrive(asked, tmp_path: Path, command):
    token = tmp_path / "token"
    token.write_text(TOKEN)
    done = CliRunner().invoke(
        app,
        [
            *(*command, "-s", THERE, "-f", "f", "--sharer-token-file", str(token), "--sharer-precision", "int8"),
            *("--sharer-timeout", "3", "--on-sharer-failure", "receiver-alone", "--max-new-tokens", "1"),
        ],
        env={"C2C_SHARER_KEY": KEY},
    )
    assert done.exit_code == 0, done.output
    remote = asked["remote"]
    assert (remote.token, remote.key, remote.precision, remote.timeout) == (TOKEN, KEY.encode(), "int8", 3)
    assert (asked["sharers"], asked["on_sharer_failure"]) == ([THERE], "receiver-alone")


@pytest.mark.parametrize("command", [("generate", "hi"), ("chat",)])
def test_the_demos_sharer_elsewhere_needs_no_fuser(asked, command):
    assert CliRunner().invoke(app, [*command, "-s", THERE, "--max-new-tokens", "1"]).exit_code == 0
    assert (asked["receiver"], asked["sharers"], asked["fusers"]) == ("smollm2-135m", [THERE], ["demo"])
    for others in (("-s", THERE, "-s", THERE), ("-s", THERE, "-r", "other")):
        done = CliRunner().invoke(app, [*command, *others])
        assert (done.exit_code, "needs one --fuser per sharer, got 0" in done.output) == (2, True)


def test_another_sharer_elsewhere_is_refused_by_the_demos_fuser(monkeypatch, receiver, sharer):
    monkeypatch.setattr("cache2cache.loading.load", lambda *_, **__: receiver)
    monkeypatch.setattr("cache2cache.loading._connect", lambda *_: sharer)
    done = run("generate", "hi", "-s", THERE)
    assert done.exit_code == 4
    assert "the fuser does not fit the pair; got tiny-receiver ← tiny-sharer" in done.stderr
    assert "allowed: smollm2-135m ← qwen2.5-coder-1.5b" in done.stderr


@pytest.mark.parametrize(
    "option",
    [
        ("--sharer-token-file", "x"),
        ("--sharer-key-file", "x"),
        ("--sharer-precision", "int4"),
        ("--sharer-timeout", "3"),
        ("--on-sharer-failure", "receiver-alone"),
    ],
)
def test_options_that_would_do_nothing_are_refused(asked, option):
    done = run("generate", "hi", *option)
    assert (done.exit_code, "need a --sharer http" in done.output) == (2, True)
    assert not asked


def test_secrets_in_the_environment_do_not_disturb_sharers_that_are_here(asked, monkeypatch):
    monkeypatch.setenv("C2C_SHARER_TOKEN", TOKEN)
    assert run("generate", "hi", "--max-new-tokens", "1").exit_code == 0
    assert asked["remote"] is None


def test_a_degraded_answer_says_so(asked, monkeypatch, receiver, sharer, fuser):
    from cache2cache import C2C
    from cache2cache.errors import SharerError

    class Dead:
        card, tokenizer, device, dtype = sharer.card, sharer.tokenizer, sharer.device, sharer.dtype

        def prefill(self, *_):
            raise SharerError("it is dead")

    pair = C2C(receiver, [Dead()], [fuser], on_sharer_failure="receiver-alone")
    monkeypatch.setattr(C2C, "from_pretrained", lambda *_, **__: pair)
    told = run("generate", "hi", "-s", THERE, "-f", "f", "--max-new-tokens", "2")
    assert "answered without tiny-sharer: it is dead" in told.stderr
    assert "dead" not in told.stdout
    told = run("generate", "hi", "-s", THERE, "-f", "f", "--max-new-tokens", "2", "--json")
    assert json.loads(told.stdout)["degraded"] == {"tiny-sharer": "it is dead"}
    told = CliRunner().invoke(app, ["chat", "-s", THERE, "-f", "f", "--max-new-tokens", "2"], input="hello\n")
    assert "answered without tiny-sharer" in told.stderr


def test_environment_variables_are_those_of_the_documents():
    from cache2cache.cli import pair

    assert (share.TOKENS, share.KEY, pair.SHARER_TOKEN, pair.SHARER_KEY) == SECRETS


@pytest.mark.slow
def test_processes(tmp_path: Path):
    """A real service: answers as in one process, drains on SIGTERM, and its death is told."""
    receiver, sharer = tiny_pair()
    for lm in (receiver, sharer):
        lm.model.save_pretrained(tmp_path / lm.card.id)
        lm.tokenizer.save_pretrained(tmp_path / lm.card.id)
    random_fuser(receiver, sharer).save_pretrained(tmp_path / "fuser")
    c2c = [sys.executable, "-m", "cache2cache"]
    env = {**os.environ, "C2C_SHARE_KEY": KEY, "C2C_SHARER_KEY": KEY, "OMP_NUM_THREADS": "1"}
    service = subprocess.Popen(
        [*c2c, "share", "tiny-sharer", "--port", "0"], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        assert service.stderr is not None
        address = next(json.loads(line)["url"] for line in service.stderr if '"sharing"' in line)

        def generate(sharer: str, *more: str) -> subprocess.CompletedProcess[str]:
            pair = ("-r", "tiny-receiver", "-s", sharer, "-f", "fuser")
            args = [*c2c, "generate", "What color?", *pair, "--json", "--max-new-tokens", "12", *more]
            return subprocess.run(args, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)

        there, here = generate(address), generate("tiny-sharer")
        assert there.returncode == here.returncode == 0, there.stderr + here.stderr
        assert json.loads(there.stdout)["ids"] == json.loads(here.stdout)["ids"]
        service.send_signal(signal.SIGTERM)
        assert service.wait(60) == 0
        dead = generate(address)
        assert (dead.returncode, "cannot be reached" in dead.stderr) == (1, True)
    finally:
        service.kill()
        service.wait()
