"""`c2c pull`, with the fake registry."""

import pytest

from cache2cache.errors import UnknownModelError
from cache2cache.models import catalogue, pull


@pytest.fixture
def command():
    import typer
    from typer.testing import CliRunner

    from cache2cache.cli.pull import pull as function

    app = typer.Typer()
    app.command()(function)
    return lambda *args: CliRunner().invoke(app, args)


def test_command_prints_folder_and_licence(command, home, registry):
    result = command("tiny")
    assert result.exit_code == 0
    assert f"tiny: {home / 'models' / 'tiny'}" in result.stdout
    assert "licence: MIT, https://example.org/mit" in result.stdout


def test_command_checks_all_names_before_it_fetches(command, home, registry):
    result = command("tiny", "smollm2-135")
    assert isinstance(result.exception, UnknownModelError)
    assert registry.asked == []


def test_command_without_names_says_how_to_use_it(command, home):
    result = command()
    assert result.exit_code == 2
    assert "--list" in result.output


def test_list_fits_a_terminal_and_shows_what_is_there(command, home, registry, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")

    def rows():
        lines = command("--list").stdout.splitlines()
        return {line.split()[0]: line.split() for line in lines if line.strip()}

    before = rows()
    assert before.keys() >= {name for model in catalogue.MODELS.values() for name in (model.name, model.hub_id)}
    assert before["gemma3-270m"][1:] == ["Gemma", "Terms", "238", "MB", "575", "MB", "no"], "the rest is one line below"
    assert before["tiny"][-1] == "no"
    pull.pull("tiny")
    assert rows()["tiny"][-1] == "yes"
