import pytest
import typer
from typer.testing import CliRunner

from cache2cache import cli, errors
from cache2cache.cli.console import ExitCode, Program, describe, exit_code, take_debug


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.DownloadError("no network"), 3),
        (errors.ChecksumError("other bytes"), 3),
        (errors.UnknownModelError("no such model"), 3),
        (errors.ModelError("no cache"), 4),
        (errors.FuserFormatError("torn"), 4),
        (errors.FuserMismatchError("another pair"), 4),
        (errors.ConversationError("empty"), 1),
        (errors.MissingExtraError("scipy"), 1),
        (ValueError("a bug"), 1),
        (typer.BadParameter("wrong"), 2),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(error: BaseException, code: int):
    assert exit_code(error) == code


def test_every_code_is_documented():
    help_text = " ".join(CliRunner().invoke(cli.app, ["--help"]).output.split())
    assert all(f"{code.value} " in help_text.partition("Exit codes:")[2] for code in ExitCode)


def test_an_error_is_one_line_with_what_got_allowed_and_hint():
    error = errors.DataError("row 3 is wrong", got="two\nlines", allowed="one", hint="Mend it")
    assert describe(error) == "row 3 is wrong; got two lines; allowed: one. Mend it"
    assert describe(KeyError("x")) == "KeyError: 'x'. Run it again with --debug to see where"


@pytest.mark.parametrize(
    ("args", "expected"),
    [
        (["chat"], (False, ["chat"])),
        (["--debug", "chat"], (True, ["chat"])),
        (["generate", "hi", "--debug"], (True, ["generate", "hi"])),
        (["generate", "--", "--debug"], (False, ["generate", "--", "--debug"])),
    ],
)
def test_debug_may_stand_anywhere(args: list[str], expected: tuple[bool, list[str]]):
    assert take_debug(args) == expected


def program(error: BaseException) -> typer.Typer:
    app = typer.Typer(cls=Program)

    @app.callback()
    def _nothing() -> None: ...

    @app.command()
    def fail() -> None:
        raise error

    return app


def test_an_error_ends_the_command_in_one_line():
    result = CliRunner().invoke(program(errors.DownloadError("no network", hint="Plug it in")), ["fail"])
    assert result.exit_code == 3
    assert result.stdout == ""
    assert result.stderr == "error: no network. Plug it in\n"


def test_debug_shows_the_traceback():
    result = CliRunner().invoke(program(ZeroDivisionError("oops")), ["fail", "--debug"])
    assert result.exit_code == 1
    assert "Traceback" in result.stderr
    assert result.stderr.splitlines()[-1].startswith("error: ZeroDivisionError: oops")


def test_interruption_is_quiet():
    result = CliRunner().invoke(program(KeyboardInterrupt()), ["fail"])
    assert (result.exit_code, result.output.strip()) == (130, "")


def test_an_exit_code_of_a_command_is_kept():
    assert CliRunner().invoke(program(typer.Exit(4)), ["fail"]).exit_code == 4


@pytest.mark.parametrize(
    "args", [["--nonsense"], ["nonsense"], ["generate", "--nonsense"], ["generate", "--mode", "x"]]
)
def test_wrong_usage_is_one_line(args: list[str]):
    result = CliRunner().invoke(cli.app, args)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert result.stderr.startswith("error: ")
    assert "--help" in result.stderr


def test_bare_command_shows_the_help():
    result = CliRunner().invoke(cli.app, [])
    assert result.exit_code == 2
    assert "Usage: " in result.output
    assert "error" not in result.stderr
