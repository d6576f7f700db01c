"""Arguments of the commands that run a recipe, and what they do first."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cache2cache.cli import extras
from cache2cache.cli import pair as options

if TYPE_CHECKING:
    from cache2cache.train.config import Machine, Recipe

File = Annotated[
    Path, typer.Argument(metavar="RECIPE", help="A TOML file, such as recipes/demo/recipe.toml; see docs/training.md.")
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Set a field of the recipe, such as optim.epochs=3 or data.train.0.limit=100; repeat for several.",
        show_default=False,
    ),
]
DataDir = Annotated[
    Path | None,
    typer.Option(
        help="Folder of data sets; the recipe's paths are relative to it.",
        show_default="here; rows of tasks from the hub",
        rich_help_panel="Machine",
    ),
]
Features = Annotated[
    Path | None,
    typer.Option(
        help="Folder that keeps prefills, for this run and later ones.",
        show_default="in the cache folder",
        rich_help_panel="Machine",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="Of receiver and fuser: cpu, cuda, cuda:1, mps, …",
        show_default="an accelerator if there is one",
        rich_help_panel="Machine",
    ),
]


def read(command: str, file: Path, overrides: list[str] | None, machine: Machine) -> Recipe:
    """The recipe, once everything that can be checked without loading a model is."""
    extras.need(command, "train", ("datasets", "tensorboard", "zstandard", "accelerate"))
    from cache2cache.train.recipes import read_recipe

    recipe = read_recipe(file, overrides or ())
    options.quiet_transformers()
    for device in filter(None, {machine.device, machine.sharer_device}):
        options.check_device(device)
    return recipe


def is_main() -> bool:
    """Whether this process speaks for all that torchrun or accelerate started."""
    return os.environ.get("RANK", "0") == "0"
