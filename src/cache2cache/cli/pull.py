"""`c2c pull`: fetch models, or list those that have a short name."""

from __future__ import annotations

from typing import Annotated

import typer


def pull(
    names: Annotated[
        list[str] | None, typer.Argument(help="Catalogue names or hub ids.", metavar="NAME...", show_default=False)
    ] = None,
    show: Annotated[bool, typer.Option("--list", help="Show the catalogue and what is there already.")] = False,
) -> None:
    """Fetch models, verify them and make them ready to load."""
    from cache2cache.models.pull import look_up, split_revision
    from cache2cache.models.pull import pull as pull_model

    if show:
        _print_catalogue()
    elif not names:
        raise typer.BadParameter("give at least one model, or --list", param_hint="NAME...")
    for name in names or []:
        look_up(split_revision(name)[0])  # a misspelt name is told before anything is fetched
    for name in names or []:
        folder = pull_model(name)
        typer.echo(f"{name}: {folder}{_licence(split_revision(name)[0])}")


def _licence(name: str) -> str:
    from cache2cache.models.catalogue import find

    model = find(name)
    return f"\n  licence: {model.licence}, {model.licence_url}" if model else ""


def _print_catalogue() -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    from cache2cache.models.catalogue import MODELS
    from cache2cache.models.pull import home, ready

    # Two lines a model, so that it fits into 80 columns
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption=f"Kept in {home() / 'models'}", caption_justify="left")
    table.add_column("model", no_wrap=True)
    table.add_column("licence", max_width=18)
    for column in ("download", "on disk", "ready"):
        table.add_column(column, justify="right", no_wrap=True)
    for model in MODELS.values():
        cells = ("from hub", "", "")
        if model.weights:
            cells = (_size(model.weights.download), _size(model.weights.converted), "yes" if ready(model) else "no")
        table.add_row(f"[bold]{model.name}[/]\n{model.hub_id}", model.licence, *cells)
    Console().print(table)


def _size(number: int) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.0f} MB"
