"""The payload benchmark's numbers as Markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any


def markdown(result: dict[str, Any]) -> str:
    """Every part that was measured."""
    parts = {"size": _sizes, "tampering": _tampering, "transfer": _transfers, "loss": _losses}
    return "\n\n".join(part(result[name]) for name, part in parts.items() if name in result)


def _sizes(sizes: Sequence[dict[str, Any]]) -> str:
    weight = {(row["what"], row["precision"], row["zstd"]): f"{row['per_position']:,.0f}" for row in sizes}
    held = {row["what"]: f"{row['positions']:,} positions of {row['prompts']} prompts" for row in sizes}
    rows = (
        (precision, *(weight[what, precision, zstd] for what in held for zstd in (False, True)))
        for precision in dict.fromkeys(row["precision"] for row in sizes)
    )
    columns = (column for what in held for column in (f"{what}, {held[what]}", "with zstd"))
    return table(("bytes per position", *columns), rows)


def _tampering(found: dict[str, Sequence[dict[str, Any]]]) -> str:
    signed, unsigned = found.values()
    rows = (
        (kind["kind"], f"{kind['times']:,}", _share(kind), _share(other))
        for kind, other in zip(signed, unsigned, strict=True)
    )
    return table(("what was done", "times", *(f"refused {how}" for how in found)), rows)


def _share(fared: dict[str, Any]) -> str:
    return f"{fared['noticed'] / fared['times']:.2%}"


def _transfers(ways: Sequence[dict[str, Any]]) -> str:
    stages = list(dict.fromkeys(stage for way in ways for stage in way if stage not in ("way", "bytes", "total")))
    rows = (
        (
            way["way"],
            f"{way['bytes']:,.0f}",
            *(f"{1000 * way[stage]:.1f}" if stage in way else "–" for stage in stages),
            f"{1000 * way['total']:.0f}",
        )
        for way in ways
    )
    return table(("one request, ms", "bytes", *stages, "total"), rows)


def _losses(tasks: dict[str, dict[str, Any]]) -> str:
    rows = ((task, name, *_loss(found)) for task, systems in tasks.items() for name, found in systems.items())
    columns = ("task", "cache", "n", "accuracy", "difference", "McNemar's p", "nats of the right answer", "difference")
    return table(columns, rows)


def _loss(found: dict[str, Any]) -> tuple[str, ...]:
    accuracy, nats = f"{found['accuracy']:.1%}", f"{found['nats']:.4f}"
    if "p" not in found:
        return f"{found['rows']:,}", accuracy, "", "", nats, ""
    right, likely = found["accuracy_difference"], found["nats_difference"]
    return (
        f"{found['rows']:,}",
        accuracy,
        f"{right['value']:+.1%} ({right['low']:+.1%} to {right['high']:+.1%}), {found['gained']} : {found['lost']}",
        f"{found['p']:.3f}",
        nats,
        f"{likely['value']:+.4f} ({likely['low']:+.4f} to {likely['high']:+.4f})",
    )


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table whose first column is text and whose others are numbers."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
