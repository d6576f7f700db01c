"""`c2c train`: a fuser from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache2cache.cli import pair as options
from cache2cache.cli import recipe as recipes

if TYPE_CHECKING:
    from cache2cache.train.config import Machine, Recipe


def train(
    recipe: recipes.File,
    overrides: recipes.Set = None,
    output: Annotated[
        Path, typer.Option("--output", "-o", help="Checkpoints and logs, and the fuser in `fuser/`.")
    ] = Path("run"),
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the run in the output folder.")] = False,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what memory, time and disk it would take, and start nothing.")
    ] = False,
    data_dir: recipes.DataDir = None,
    features: recipes.Features = None,
    no_features: Annotated[
        bool,
        typer.Option("--no-features", help="Keep none: compute them in every step.", rich_help_panel="Machine"),
    ] = False,
    device: recipes.Device = None,
    sharer_device: options.SharerDevice = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Train a fuser for a pair of frozen models.

    Under torchrun or accelerate launch every process takes its share of the rows.
    """
    if features and no_features:
        raise typer.BadParameter("--no-features goes without --features")
    if plan and resume:
        raise typer.BadParameter("--plan starts nothing, so there is nothing to --resume")
    from cache2cache.models.pull import home
    from cache2cache.train.config import Machine

    kept = None if no_features else features or home() / "features"
    machine = Machine(data_dir, kept, device, sharer_device, trust_remote_code)
    read = recipes.read("c2c train", recipe, overrides, machine)
    if plan:
        if recipes.is_main():
            _show_plan(read, machine)
        return
    import json

    from rich.console import Console

    from cache2cache.train.run import train as run

    summary = run(read, output, machine, resume=resume)
    if recipes.is_main():
        console = Console()
        console.print_json(json.dumps(summary))
        console.print(f"saved: {output / 'fuser'}")


def _show_plan(recipe: Recipe, machine: Machine) -> None:
    from rich.console import Console
    from rich.table import Table

    from cache2cache.train.plan import plan

    table = Table(box=None, show_header=False, pad_edge=False)
    for row in plan(recipe, machine).rows():
        table.add_row(*row)
    Console(markup=False).print(table)
