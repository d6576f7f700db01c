"""`c2c chat`: a conversation in the terminal, on one fused cache."""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cache2cache.cli import answer as show
from cache2cache.cli import pair as options
from cache2cache.cli.console import print_error
from cache2cache.errors import C2CError

if TYPE_CHECKING:
    from cache2cache.chat import Chat
    from cache2cache.pipeline import C2C

HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer and takes its turn back."


def chat(
    receiver: options.Receiver = options.DEMO_RECEIVER,
    sharer: options.Sharers = None,
    fuser: options.Fusers = None,
    no_sharer: options.NoSharer = False,
    mode: options.Mode = "parallel",
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    timings: options.ShowTimings = False,
    max_new_tokens: options.MaxNewTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    device: options.Device = "cpu",
    sharer_device: options.SharerDevice = None,
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    sharer_token_file: options.SharerTokenFile = None,
    sharer_key_file: options.SharerKeyFile = None,
    sharer_precision: options.SharerPrecision = None,
    sharer_timeout: options.SharerTimeout = None,
    on_sharer_failure: options.OnSharerFailure = "fail",
) -> None:
    """Chat with a pair; earlier turns are not read again.

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
    """
    kwargs = options.generate_kwargs(max_new_tokens, temperature, top_p)
    pair = options.load_pair(
        receiver,
        sharer,
        fuser,
        no_sharer=no_sharer,
        mode=mode,
        device=device,
        sharer_device=sharer_device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        elsewhere=options.Elsewhere(
            sharer_token_file, sharer_key_file, sharer_precision, sharer_timeout, on_sharer_failure
        ),
    )
    options.set_seed(seed)
    typer.secho(f"{show.names(pair)}. {HELP}", err=True, dim=True)
    converse(pair, pair.chat(system), kwargs, timings=timings)


def converse(pair: C2C, talk: Chat, kwargs: dict[str, Any], *, timings: bool) -> None:
    """Read turns and answer them until the user leaves."""
    while (text := read_turn()) is not None:
        match text.strip():
            case "":
                continue
            case "/exit" | "/quit":
                return
            case "/reset":
                talk.reset()
                typer.secho("forgotten", err=True, dim=True)
                continue
            case command if command.startswith("/") and " " not in command:
                typer.secho(f"no command {command}. {HELP}", err=True, dim=True)
                continue
        try:
            result = show.write(talk.stream(text, **kwargs))
        except KeyboardInterrupt:
            typer.secho("stopped", err=True, dim=True)
        except C2CError as error:  # a turn too long for the context, for instance: the conversation goes on
            print_error(error)
        else:
            show.warn_if_degraded(pair, result)
            if timings:
                show.print_summary(pair, result)


def read_turn() -> str | None:
    """One line from the user; None when there will be no more."""
    interactive = sys.stdin.isatty()
    if interactive:
        with contextlib.suppress(ImportError):  # there is none on Windows
            import readline  # noqa: F401  editing and history for input()
    while True:
        try:
            return input("> " if interactive else "")
        except EOFError:
            if interactive:
                typer.echo()
            return None
        except KeyboardInterrupt:
            typer.secho(f"\n{HELP}", err=True, dim=True)
