"""Showing an answer: pieces as they come, and where the time went."""

from __future__ import annotations

import sys
from collections.abc import Generator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from cache2cache.pipeline import C2C
    from cache2cache.types import Generation


def write(pieces: Generator[str, None, Generation]) -> Generation:
    """Write a stream to stdout as it comes; returns the whole answer."""
    try:
        while True:
            sys.stdout.write(next(pieces))
            sys.stdout.flush()
    except StopIteration as end:
        return end.value
    finally:
        pieces.close()  # if it was cut short, decoding must not go on behind the prompt
        sys.stdout.write("\n")
        sys.stdout.flush()


def summary(pair: C2C, answer: Generation) -> str:
    """Tokens and seconds in one line."""
    read = " + ".join(map(str, (answer.counts.receiver_prompt, *answer.counts.sharer_prompt)))
    stages = {name: seconds for name, seconds in asdict(answer.timings).items() if seconds}
    spent = ", ".join(f"{name.replace('_', ' ')} {seconds:.2f}" for name, seconds in stages.items())
    return (
        f"{names(pair)} · read {read} tokens, wrote {answer.counts.generated} · {answer.timings.total:.2f} s: {spent}"
    )


def print_summary(pair: C2C, answer: Generation) -> None:
    typer.secho(summary(pair, answer), err=True, dim=True)


def warn_if_degraded(pair: C2C, answer: Generation) -> None:
    """One line on stderr for each sharer that should have spoken and could not."""
    for sharer, reason in answer.degraded.items():
        typer.secho("warning: ", err=True, nl=False, fg=typer.colors.YELLOW, bold=True)
        typer.echo(f"answered without {pair.sharers[sharer].card.id}: {' '.join(reason.split())}", err=True)


def names(pair: C2C) -> str:
    """receiver ← sharer, sharer."""
    sharers = ", ".join(sharer.card.id for sharer in pair.sharers)
    return f"{pair.receiver.card.id} ← {sharers}" if sharers else pair.receiver.card.id


def as_json(pair: C2C, answer: Generation) -> dict[str, Any]:
    """An answer for machines."""
    return {
        "text": answer.text,
        "ids": answer.ids,
        "receiver": pair.receiver.card.id,
        "sharers": [sharer.card.id for sharer in pair.sharers],
        "degraded": {pair.sharers[sharer].card.id: reason for sharer, reason in answer.degraded.items()},
        "counts": asdict(answer.counts),
        "timings": asdict(answer.timings) | {"total": answer.timings.total},
    }
