"""How every command ends: exit codes, and errors as one readable line.

Knows no command. Nothing here may import torch: `c2c --help` passes through this file.
"""

from __future__ import annotations

import sys
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from enum import IntEnum
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from cache2cache.errors import (
    C2CError,
    DownloadError,
    FuserFormatError,
    FuserMismatchError,
    ModelError,
    UnknownModelError,
)


class ExitCode(IntEnum):
    """What the shell is told."""

    OK = 0
    ERROR = 1
    USAGE = 2
    NOT_FETCHED = 3
    DOES_NOT_FIT = 4
    INTERRUPTED = 130


EXIT_CODES = (
    "Exit codes: 0 done · 1 error · 2 wrong usage · 3 a model or fuser could not be fetched · "
    "4 a model or fuser is damaged or does not fit · 130 interrupted"
)


def exit_code(error: BaseException) -> ExitCode:
    """The exit code of an error."""
    match error:
        case DownloadError() | UnknownModelError():
            return ExitCode.NOT_FETCHED
        case ModelError() | FuserFormatError() | FuserMismatchError():
            return ExitCode.DOES_NOT_FIT
        case typer.TyperException():
            return ExitCode.USAGE
        case KeyboardInterrupt() | typer.Abort():
            return ExitCode.INTERRUPTED
        case _:
            return ExitCode.ERROR


def describe(error: BaseException) -> str:
    """An error in one line: what, got, allowed, and what to do next."""
    match error:
        case C2CError():
            text = str(error)
        case typer.TyperException():
            ctx = getattr(error, "ctx", None)
            text = f"{error.format_message().rstrip('.')}. See {ctx.command_path if ctx else 'c2c'} --help"
        case _:
            text = f"{type(error).__name__}: {error}. Run it again with --debug to see where"
    return " ".join(text.split())


def print_error(error: BaseException) -> None:
    """One line on stderr."""
    typer.secho("error: ", err=True, nl=False, fg=typer.colors.RED, bold=True)
    typer.echo(describe(error), err=True)


@contextmanager
def reported(debug: bool) -> Iterator[None]:
    """Turn whatever goes wrong inside into one line and an exit code; with `debug`, into a traceback first."""
    try:
        yield
    except (KeyboardInterrupt, typer.Abort) as error:
        typer.echo(err=True)
        raise SystemExit(exit_code(error)) from error
    except Exception as error:
        if debug:
            traceback.print_exc()
        # typer's way of showing the help to a bare `c2c` is an error that says nothing.
        if str(error) or not isinstance(error, typer.TyperException):
            print_error(error)
        raise SystemExit(exit_code(error)) from error


class Program(TyperGroup):
    """The program itself: all its commands, with errors reported."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> NoReturn:
        """Run one command and exit."""
        debug, args = take_debug(sys.argv[1:] if args is None else args)
        with reported(debug):
            # Not standalone, so that errors come to us.
            outcome = super().main(args, prog_name or "c2c", complete_var, False, windows_expand_args, **extra)
        sys.exit(outcome if isinstance(outcome, int) else ExitCode.OK)


def take_debug(args: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether `--debug` stands anywhere before a `--`, and the arguments without it."""
    end = args.index("--") if "--" in args else len(args)
    options = [arg for arg in args[:end] if arg != "--debug"]
    return len(options) < end, [*options, *args[end:]]
