"""`c2c train`: what it asks of whom, and what it says."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from typer.testing import CliRunner

from cache2cache.cli import app
from cache2cache.cli.console import ExitCode


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What the run or the plan was asked for, in place of doing it."""
    asked: dict[str, Any] = {}

    def train(recipe, output, machine, *, resume=False):
        asked.update(recipe=recipe, output=output, machine=machine, resume=resume)
        return {"steps": 126}

    def plan(recipe, machine):
        asked.update(planned=recipe, machine=machine)
        return SimpleNamespace(rows=lambda: [("memory", "in all", "1.5 GB"), ("note", "[unknown]", "")])

    monkeypatch.setattr("cache2cache.train.run.train", train)
    monkeypatch.setattr("cache2cache.train.plan.plan", plan)
    return asked


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["train", *map(str, arguments)], env={"COLUMNS": "200"})


def test_a_recipe_is_run(recipe, asked, tmp_path):
    result = invoke(
        recipe, "--set", "optim.epochs=5", "--set", "seed=3", "-o", tmp_path / "out", "--data-dir", tmp_path
    )
    assert result.exit_code == 0, result.output
    assert (asked["recipe"].optim.epochs, asked["recipe"].seed) == (5, 3)
    assert (asked["output"], asked["resume"]) == (tmp_path / "out", False)
    machine = asked["machine"]
    assert (machine.data_dir, machine.device, machine.sharer_device) == (tmp_path, None, None)
    assert machine.features.name == "features" and machine.features.parent.name == "c2c-home"
    assert '"steps": 126' in result.output and f"saved: {tmp_path / 'out' / 'fuser'}" in result.output


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--no-features"], "features", None),
        (["--features", "kept"], "features", Path("kept")),
        (["--device", "cpu"], "device", "cpu"),
        (["--sharer-device", "cpu"], "sharer_device", "cpu"),
        (["--trust-remote-code"], "trust_remote_code", True),
    ],
)
def test_where_it_runs(recipe, asked, arguments, field, value):
    assert invoke(recipe, *arguments).exit_code == 0
    assert getattr(asked["machine"], field) == value


def test_resume_is_passed_on(recipe, asked):
    assert invoke(recipe, "--resume").exit_code == 0
    assert asked["resume"] is True


def test_a_plan_starts_nothing(recipe, asked):
    result = invoke(recipe, "--plan", "--set", "seed=3")
    assert result.exit_code == 0, result.output
    assert asked["planned"].seed == 3 and "recipe" not in asked
    for words in ("memory", "1.5 GB", "[unknown]"):
        assert words in result.output


def test_of_several_processes_only_the_main_one_speaks(recipe, asked, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    for arguments in ((), ("--plan",)):
        result = invoke(recipe, *arguments)
        assert result.exit_code == 0 and result.output == ""
    assert "recipe" in asked, "all of them train"
    assert "planned" not in asked


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--features", "x", "--no-features"], ExitCode.USAGE, "--no-features"),
        (["--plan", "--resume"], ExitCode.USAGE, "--resume"),
        (["--set", "optim.epoch=3"], ExitCode.ERROR, "did you mean optim.epochs?"),
        (["--device", "abacus"], ExitCode.DOES_NOT_FIT, "no device abacus"),
        (["--sharer-device", "abacus"], ExitCode.DOES_NOT_FIT, "no device abacus"),
    ],
)
def test_what_is_refused_before_anything_starts(recipe, asked, arguments, code, words):
    result = invoke(recipe, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert not asked


def test_a_recipe_that_is_not_there(asked, tmp_path):
    result = invoke(tmp_path / "absent.toml")
    assert result.exit_code == ExitCode.ERROR and "no such recipe" in result.output


@pytest.mark.parametrize("library", ["datasets", "tensorboard", "zstandard", "accelerate"])
def test_a_missing_library_is_named_with_the_extra_that_has_it(recipe, asked, monkeypatch, library):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == library else find(name))
    result = invoke(recipe)
    assert result.exit_code == ExitCode.ERROR
    assert f"no {library}" in result.output and "cache2cache[train]" in result.output
    assert not asked
