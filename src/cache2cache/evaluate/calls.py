"""The calls that made a run: what was typed, who was asked, and whether it came to its end.

A run is often made in several calls, which add systems or go on after an interruption.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from pydantic import BaseModel, ConfigDict, TypeAdapter, ValidationError

from cache2cache.errors import DataError

CALLS = "calls.json"


class Call(BaseModel):
    """One call."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    command: str
    started: str
    systems: Mapping[str, str]
    """Who was asked: name → as it was asked for, `t2t:300`."""
    ended: bool = False
    """Whether all of them answered all of their rows."""
    seconds: float = 0.0
    """Of asking, without loading, until it ended or was interrupted; 0 if it was killed."""


_CALLS = TypeAdapter(list[Call])


@contextmanager
def recorded(out: Path, command: str, systems: Mapping[str, str]) -> Iterator[None]:
    """Write a call down when it begins, and again when it ends."""
    start, before = time.time(), read_calls(out)
    call = Call(
        command=command, started=time.strftime("%Y-%m-%d %H:%M:%S %z", time.localtime(start)), systems=dict(systems)
    )
    _write(out, [*before, call])
    ended = False
    try:
        yield
        ended = True
    finally:
        seconds = round(time.time() - start, 1)
        _write(out, [*before, call.model_copy(update={"ended": ended, "seconds": seconds})])


def read_calls(out: Path) -> list[Call]:
    """All calls of a run, in order.

    Raises:
        DataError: the file is damaged.
    """
    path = out / CALLS
    if not path.is_file():
        return []
    try:
        return _CALLS.validate_json(path.read_bytes())
    except ValidationError as error:
        raise DataError(
            f"{path} is damaged", got=error.errors()[0]["msg"], hint=f"Delete {out} to begin anew"
        ) from error


def whole(calls: Sequence[Call]) -> dict[str, str]:
    """The systems whose latest call came to its end, so that none of their rows is missing: name → as it was asked for."""
    latest = {name: call for call in calls for name in call.systems}
    return {name: call.systems[name] for name, call in latest.items() if call.ended}


def _write(out: Path, calls: Sequence[Call]) -> None:
    partial = (out / CALLS).with_suffix(".partial")
    partial.write_bytes(_CALLS.dump_json(list(calls), indent=1))
    os.replace(partial, out / CALLS)
