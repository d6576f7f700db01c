"""`c2c train`: a fuser from a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def train(
    recipe: Annotated[Path, typer.Argument(help="TOML file, such as recipes/demo/recipe.toml.")],
    data_dir: Annotated[Path, typer.Option(help="What the recipe's data paths are relative to.")] = Path(),
    output: Annotated[Path, typer.Option("--output", "-o", help="Checkpoints, and the fuser in `fuser/`.")] = Path(
        "run"
    ),
    features: Annotated[Path | None, typer.Option(help="Prefills on disk; default: in the cache folder.")] = None,
    resume: Annotated[bool, typer.Option(help="Go on from the last checkpoint in the output folder.")] = False,
) -> None:
    """Train a fuser for a pair of frozen models."""
    import json

    from rich.console import Console

    from cache2cache.models.pull import home
    from cache2cache.train.config import read_recipe
    from cache2cache.train.trainer import train as run

    read = read_recipe(recipe)
    summary = run(read, data_dir, output, features or home() / "features", resume=resume)
    console = Console()
    console.print_json(json.dumps(summary))
    console.print(f"saved: {output / 'fuser'}")
