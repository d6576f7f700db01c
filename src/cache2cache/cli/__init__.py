"""The command `c2c`. One small file per command; each imports torch only once it runs."""

from __future__ import annotations

from typing import Annotated

import typer

from cache2cache import __version__
from cache2cache.cli import chat, demo, doctor, evaluate, features, fuser, generate, pull, serve, share, train
from cache2cache.cli.console import EXIT_CODES, Program

app = typer.Typer(cls=Program, no_args_is_help=True, epilog=EXIT_CODES, rich_markup_mode="rich")


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"cache2cache {__version__}")
        raise typer.Exit


@app.callback()
def c2c(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[
        bool, typer.Option("--debug", help="Show the traceback of an error. May stand anywhere in the command.")
    ] = False,
) -> None:
    """Language models that talk through their KV-caches instead of text.

    A receiver answers from its own cache, into which the caches of one or several sharers were fused.
    Begin with: c2c demo
    """


app.command()(demo.demo)
app.command()(generate.generate)
app.command()(chat.chat)
app.command()(pull.pull)
app.add_typer(fuser.app, name="fuser")
app.command()(train.train)
app.command()(features.features)
app.add_typer(evaluate.app, name="eval")
app.command()(serve.serve)
app.command()(share.share)
app.command()(doctor.doctor)


def main() -> None:
    """Entry point of the console script."""
    app()
