"""`c2c fuser`: look at fusers, convert them, try them on a pair."""

from __future__ import annotations

import json as jsonlib
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from cache2cache.cli import pair as options
from cache2cache.cli.console import ExitCode

if TYPE_CHECKING:
    from cache2cache.fuser.base import Fuser
    from cache2cache.verify import Check

app = typer.Typer(no_args_is_help=True, help="Look at fusers, convert them, try them on a pair.")

Location = Annotated[
    str, typer.Argument(metavar="FUSER", help="`demo`, `general`, a folder, or a hub id: org/repo or org/repo/folder.")
]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="The same for machines.")]


@app.command()
def inspect(fuser: Location, revision: Revision = None, json: Json = False) -> None:
    """Show what a fuser is: kind, sizes, pair, layer map, gates, training."""
    from cache2cache.fuser.hub import locate
    from cache2cache.fuser.store import load_fuser

    folder = locate(fuser, revision)
    facts = describe(load_fuser(folder, dtype=None), folder)
    if json:
        typer.echo(jsonlib.dumps(facts, ensure_ascii=False, indent=2))
    else:
        _show(facts)


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="`demo`, `general`, a folder, or a hub id.")],
    destination: Annotated[Path, typer.Argument(help="A folder that is not there yet, or empty.")],
    to: Annotated[
        Literal["native", "published"] | None, typer.Option(help="The other layout than the source's by default.")
    ] = None,
    revision: Revision = None,
) -> None:
    """Turn a published checkpoint into a fuser folder, or the other way round; weights keep their dtype."""
    from cache2cache.errors import FuserFormatError
    from cache2cache.fuser import export, published
    from cache2cache.fuser.hub import locate
    from cache2cache.fuser.store import load_fuser, save_fuser

    destination = destination.expanduser()
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise FuserFormatError("the destination is not empty", got=destination, hint="Name a new folder")
    folder = locate(source, revision)
    fuser = load_fuser(folder, dtype=None)
    to = to or ("native" if published.find(folder) else "published")
    (export.save_published if to == "published" else save_fuser)(fuser, destination)
    typer.echo(f"{destination}: {fuser.parameter_count():,} parameters, {to} layout")
    if to == "published" and (lost := export.left_out(fuser.config)):
        typer.echo(
            f"the published layout has no place for {', '.join(lost)}: they only matter for training on", err=True
        )


@app.command()
def verify(
    fuser: Location,
    receiver: options.Receiver,
    sharer: Annotated[str, typer.Option("--sharer", "-s", help="The model it listens to.", rich_help_panel="Pair")],
    revision: Revision = None,
    device: options.Device = "cpu",
    dtype: options.Dtype = "auto",
    trust_remote_code: options.TrustRemoteCode = False,
    json: Json = False,
) -> None:
    """Try a fuser on loaded models: sizes, rotary embeddings, tokenizers, and whether it changes an answer.

    Weights are not compared: for models of the same form under other names there is a warning.
    """
    with options.Busy(f"loading {fuser}, {receiver}, {sharer}"):
        options.quiet_transformers()
        options.check_device(device)
        from cache2cache.fuser.base import Fuser
        from cache2cache.models.load import load
        from cache2cache.verify import verify as try_out

        loaded = Fuser.from_pretrained(fuser, revision=revision).to(device)
        pair = [load(x, device=device, dtype=dtype, trust_remote_code=trust_remote_code) for x in (receiver, sharer)]
        checks = try_out(loaded, *pair)
    passed = all(check.passed for check in checks)
    if json:
        report = {"fuser": fuser, "receiver": receiver, "sharer": sharer, "passed": passed}
        typer.echo(jsonlib.dumps(report | {"checks": [vars(check) for check in checks]}, ensure_ascii=False, indent=2))
    else:
        for check in checks:
            typer.echo(f"{_mark(check)} {check.name}: {check.detail}")
    if not passed:
        raise typer.Exit(ExitCode.DOES_NOT_FIT)


def _mark(check: Check) -> str:
    if check.warning:
        return typer.style("!", fg="yellow")
    return typer.style("✓", fg="green") if check.passed else typer.style("✗", fg="red")


def describe(fuser: Fuser, folder: Path) -> dict[str, Any]:
    """Everything that `inspect` shows."""
    keys, values = fuser.gate.logit.float().tolist()
    return {
        "folder": str(folder),
        "bytes": sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()),
        "parameters": fuser.parameter_count(),
        "dtype": str(fuser.dtype).removeprefix("torch."),
        "gate_logits": {"keys": keys, "values": values},
        **fuser.config.model_dump(mode="json"),
        "sizes": fuser.sizes.model_dump(),
    }


def _show(facts: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(facts):
        table.add_row(name, text)
    console = Console(highlight=False, markup=False)
    console.print(table)
    if facts["training"]:
        console.print("training", style="bold")
        for line in _tree(facts["training"]):
            console.print(f"  {line}", soft_wrap=True)


def _listed(values: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _lines(facts: dict[str, Any]) -> Iterator[tuple[str, str]]:
    receiver, sharer = facts["receiver"], facts["sharer"]
    yield "fuser", facts["folder"]
    yield "pair", f"{receiver['id']} ← {sharer['id']}"
    parts = {name: value for name, value in facts["sizes"].items() if isinstance(value, bool | str)}
    numbers = {name: value for name, value in facts["sizes"].items() if name not in parts}
    yield "kind", f"{facts['kind']}  ({_listed(numbers)})"
    if parts:
        yield "parts", _listed(parts)
    yield "size", f"{facts['parameters']:,} parameters, {facts['dtype']}, {facts['bytes'] / 1e6:,.1f} MB"
    for side, card in (("receiver", receiver), ("sharer", sharer)):
        yield side, model_line(card)
    yield "layer map", f"{compact_map(facts['layer_map'])}   (receiver ← sharer)"
    for kind, logits in facts["gate_logits"].items():
        marks = "".join("●" if logit > 0 else "○" for logit in logits)
        yield f"gates, {kind}", f"{marks}  {sum(logit > 0 for logit in logits)} of {len(logits)} open"
    yield "alignment", facts["alignment"]
    for side in ("receiver", "sharer"):
        yield f"{side}'s template", facts[f"{side}_template"] or "its own"
    yield "fused positions", f"the last {facts['fuse_last']}" if facts["fuse_last"] else "all"
    yield "written by", f"cache2cache {facts['package_version']}"


def model_line(card: dict[str, Any]) -> str:
    """A model card in one line."""
    size = card["geometry"]
    parts = [f"{card['id']}{'@' + card['revision'] if card['revision'] else ''}: {size['layers']} layers"]
    parts.append(f"{size['kv_heads']} KV heads × {size['head_dim']}")
    if size["vocab_size"]:
        parts.append(f"vocabulary {size['vocab_size']:,}")
    if size["max_positions"]:
        parts.append(f"context {size['max_positions']:,}")
    parts.append(f"tokenizer {card['tokenizer'] or 'not recorded'}")
    return ", ".join(parts)


def compact_map(layer_map: Sequence[int]) -> str:
    """A layer map in runs: (0, 0, 0, 1, 2) → `0–2 ← 0 · 3–4 ← 1–2`."""
    runs: list[list[int]] = [[0]]
    step = None
    for before, after in pairwise(range(len(layer_map))):
        this = layer_map[after] - layer_map[before]
        if this in (0, 1) and step in (None, this):
            runs[-1].append(after)
            step = this
        else:
            runs.append([after])
            step = None
    return " · ".join(f"{_range(run[0], run[-1])} ← {_range(layer_map[run[0]], layer_map[run[-1]])}" for run in runs)


def _range(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}–{last}"


def _tree(values: dict[str, Any], indent: str = "") -> Iterator[str]:
    """Nested dicts as indented lines; of long lists only the ends."""
    for name, value in values.items():
        if isinstance(value, dict):
            yield f"{indent}{name}:"
            yield from _tree(value, indent + "  ")
        elif isinstance(value, list) and len(value) > 8:
            yield f"{indent}{name}: {len(value)} values, {value[0]} … {value[-1]}"
        else:
            yield f"{indent}{name}: {value if isinstance(value, str) else jsonlib.dumps(value, ensure_ascii=False)}"
