"""`c2c features`: what it asks for."""

import importlib.util

import pytest
from typer.testing import CliRunner

from cache2cache.cli import app
from cache2cache.cli.console import ExitCode


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list:
    """Recipe and machine of every precomputation that was asked for."""
    asked = []
    monkeypatch.setattr(
        "cache2cache.train.features.precompute", lambda recipe, machine: asked.append((recipe, machine))
    )
    return asked


def invoke(*arguments: object):
    return CliRunner().invoke(app, ["features", *map(str, arguments)], env={"COLUMNS": "200"})


def test_the_features_of_a_recipe_are_asked_for(recipe, asked, tmp_path):
    result = invoke(recipe, "--set", "data.max_tokens=64", "--data-dir", tmp_path, "--features", tmp_path / "kept",
                    "--device", "cpu", "--sharer-device", "cpu")  # fmt: skip
    assert result.exit_code == 0, result.output
    ((read, machine),) = asked
    assert read.data.max_tokens == 64
    assert (machine.data_dir, machine.features) == (tmp_path, tmp_path / "kept")
    assert (machine.device, machine.sharer_device) == ("cpu", "cpu")


def test_they_are_kept_where_training_looks_for_them(recipe, asked):
    assert invoke(recipe).exit_code == 0
    ((_, machine),) = asked
    assert machine.features.name == "features" and machine.features.parent.name == "c2c-home"


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["--set", "optim.epoch=3"], ExitCode.ERROR, "did you mean optim.epochs?"),
        (["--device", "abacus"], ExitCode.DOES_NOT_FIT, "no device abacus"),
        (["--no-features"], ExitCode.USAGE, "No such option"),
    ],
)
def test_what_is_refused_before_anything_starts(recipe, asked, arguments, code, words):
    result = invoke(recipe, *arguments)
    assert result.exit_code == code, result.output
    assert words in result.output
    assert not asked


def test_a_missing_library_is_named_with_the_command(recipe, asked, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "datasets" else find(name))
    result = invoke(recipe)
    assert result.exit_code == ExitCode.ERROR
    assert "c2c features needs more libraries; got no datasets" in result.output
    assert not asked
