import json

import pytest
from typer.testing import CliRunner

from cache2cache import Fuser
from cache2cache.cli import app
from cache2cache.cli.console import ExitCode
from cache2cache.cli.fuser import compact_map
from cache2cache.models import load
from cache2cache.testing import random_fuser


def run(*args: object):
    return CliRunner().invoke(app, ["fuser", *map(str, args)], env={"COLUMNS": "200"})


@pytest.fixture
def saved(fuser, tmp_path):
    return fuser.save_pretrained(tmp_path / "saved")


@pytest.mark.parametrize("command", ["inspect", "convert", "verify"])
def test_help(command):
    result = run(command, "--help")
    assert result.exit_code == 0, result.output
    assert "Usage" in result.output


def test_inspect(receiver, sharer, tmp_path):
    fuser = random_fuser(receiver, sharer, fuse_last=16, training={"steps": 700, "accuracy": {"arc": 0.66}})
    fuser.gate.logit.data[1, 0] = -1.0
    result = run("inspect", fuser.save_pretrained(tmp_path / "f"))
    assert result.exit_code == 0, result.output
    for text in (
        "tiny-receiver ← tiny-sharer",
        "compact  (width 16, inner 24, blocks 1, dropout 0.0)",
        "still_keys True, weigh True, combine add, hear_own True",
        f"{fuser.parameter_count():,} parameters, float32",
        "2 layers, 2 KV heads × 16, vocabulary 260",
        "0–1 ← 1–2",
        "●●  2 of 2 open",
        "○●  1 of 2 open",
        "native",
        "the last 16",
        "training\n  steps: 700\n  accuracy:\n    arc: 0.66\n",
    ):
        assert text in result.output


def test_inspect_for_machines(saved, fuser):
    facts = json.loads(run("inspect", saved, "--json").stdout)
    assert facts["parameters"] == fuser.parameter_count()
    assert facts["layer_map"] == list(fuser.config.layer_map)
    assert facts["gate_logits"] == {"keys": [2.0, 2.0], "values": [2.0, 2.0]}
    assert facts["bytes"] > 4 * facts["parameters"]


def test_inspect_nothing(tmp_path):
    result = run("inspect", tmp_path)
    assert result.exit_code == ExitCode.DOES_NOT_FIT
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1


def test_a_revision_of_what_has_none(tmp_path):
    for command in (["inspect", "demo"], ["convert", "demo", tmp_path / "out"]):
        result = run(*command, "--revision", "no-such-revision")
        assert result.exit_code == ExitCode.DOES_NOT_FIT
        assert "demo has no revisions" in result.stderr


def test_convert_there_and_back(receiver, sharer, tmp_path):
    fuser = random_fuser(receiver, sharer, "paper", alignment="same-ids")
    fuser.save_pretrained(tmp_path / "ours")
    assert "published layout" in run("convert", tmp_path / "ours", tmp_path / "theirs").output
    assert (tmp_path / "theirs/final/projector_1.pt").is_file()
    assert "native layout" in run("convert", tmp_path / "theirs", tmp_path / "back").output
    assert Fuser.from_pretrained(tmp_path / "back").config.layer_map == fuser.config.layer_map


def test_convert_says_what_the_published_layout_has_no_place_for(receiver, sharer, tmp_path):
    gate = {"learned": False, "initial_logit": 2.0, "kinds": ["values"]}
    random_fuser(receiver, sharer, "paper", alignment="same-ids", gate=gate).save_pretrained(tmp_path / "ours")
    result = run("convert", tmp_path / "ours", tmp_path / "theirs")
    assert result.exit_code == 0, result.output
    told = 'no place for gate.learned = false, gate.initial_logit = 2.0, gate.kinds = ["values"]: they only matter for training'
    assert told in result.stderr
    assert "no place" not in run("convert", tmp_path / "theirs", tmp_path / "back").stderr


def test_convert_overwrites_nothing(saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    for destination in (tmp_path, f"~/{tmp_path.name}"):
        result = run("convert", saved, destination, "--to", "native")
        assert result.exit_code == ExitCode.DOES_NOT_FIT
        assert "not empty" in result.stderr


def test_convert_what_cannot_be_published(saved, tmp_path):
    result = run("convert", saved, tmp_path / "new")
    assert result.exit_code == ExitCode.DOES_NOT_FIT
    assert "kind compact" in result.stderr
    assert not (tmp_path / "new").exists()


@pytest.fixture
def models(monkeypatch, receiver, sharer):
    """Loading by name gives the tiny pair."""
    monkeypatch.setattr(load, "load", lambda name, **_: {"R": receiver, "S": sharer}[name])


def test_verify(saved, models):
    result = run("verify", saved, "--receiver", "R", "--sharer", "S")
    assert result.exit_code == 0, result.output
    assert result.stdout.count("✓") == 4


def test_verify_other_models(saved, models, monkeypatch, receiver):
    monkeypatch.setattr(receiver, "card", receiver.card.model_copy(update={"id": "another"}))
    result = run("verify", saved, "--receiver", "R", "--sharer", "S")
    assert result.exit_code == 0, result.output
    assert "! has other names for its models: another instead of tiny-receiver" in result.stdout


def test_verify_swapped(saved, models):
    result = run("verify", saved, "--receiver", "S", "--sharer", "R", "--json")
    assert result.exit_code == ExitCode.DOES_NOT_FIT
    report = json.loads(result.stdout)
    assert not report["passed"]
    assert "swapped" in report["checks"][0]["detail"]


@pytest.mark.parametrize(
    ("layer_map", "text"),
    [
        ((3,), "0 ← 3"),
        ((2, 3, 4, 5), "0–3 ← 2–5"),
        ((0, 0, 0, 1, 2), "0–2 ← 0 · 3–4 ← 1–2"),
        ((0, 2, 3, 5), "0 ← 0 · 1–2 ← 2–3 · 3 ← 5"),
    ],
)
def test_layer_map_in_runs(layer_map, text):
    assert compact_map(layer_map) == text
