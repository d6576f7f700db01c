"""`c2c eval`: what is said before anything is loaded."""

import importlib.util

import pytest
from typer.testing import CliRunner

from cache2cache.cli import app


def invoke(*arguments):
    return CliRunner().invoke(app, ["eval", *arguments])


def test_the_known_tasks_are_listed_with_their_licences():
    result = invoke("tasks")
    assert result.exit_code == 0
    for words in ("arc_easy", "mmlu_redux", "gsm8k", "CC BY"):
        assert words in result.output


@pytest.mark.parametrize(
    "arguments", [(), ("--tasks", "arc-easy"), ("--out", "x"), ("--tasks", "arc-easy", "--out", "x", "-s", "b")]
)
def test_what_is_needed_is_asked_for(arguments):
    assert invoke(*arguments).exit_code == 2


def test_a_list_without_tasks_is_refused():
    result = invoke("--tasks", " , ", "--out", "x")
    assert (result.exit_code, "no task is named" in result.output) == (2, True)


def test_seeds_are_what_numpy_takes():
    for seed in ("-1", str(2**32)):
        result = invoke("--tasks", "arc-easy", "--out", "x", "--seed", seed)
        assert (result.exit_code, "--seed" in result.output) == (2, True)


def test_sharers_elsewhere_are_refused_before_anything_is_fetched(monkeypatch, tmp_path):
    monkeypatch.setattr("cache2cache.evaluate.evaluation._load", lambda *_: pytest.fail("a task was fetched"))
    address = "http://127.0.0.1:1"
    result = invoke("--tasks", "arc-easy", "--out", str(tmp_path / "x"), "-s", address, "-f", "demo")
    assert result.exit_code == 1, result.output
    assert address in result.output
    assert "http" not in invoke("--help").output


@pytest.mark.parametrize("arguments", [("--tasks", "arc-easy", "--out", "run"), ("compare", "a", "b")])
def test_a_missing_library_is_named_with_the_extra_that_has_it(arguments, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "scipy" else find(name))
    result = invoke(*arguments)
    assert result.exit_code == 1
    assert "no scipy" in result.output
    assert "cache2cache[eval]" in result.output
