"""The folder of one run: what it was run with, and that only one process writes into it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cache2cache.errors import DataError

SETTINGS = "run.json"
ROWS = "rows.jsonl"
LATENCY = "latency.jsonl"
SYSTEMS = "systems"
DECISIONS = "decisions.json"
ROUTERS = "router-{}.safetensors"

_ABSENT = "absent"
_SHOWN = 100


@contextmanager
def held(out: Path, settings: Mapping[str, Any]) -> Iterator[None]:
    """Hold a run's folder, made if it is not there. A folder that holds rows already must have the same settings.

    Where no row was asked yet, other settings take the place of those that are there, and what was decided for them goes.

    Args:
        settings: everything that changes the numbers, as JSON. Entries may be added to `systems` later, since the rows
            of one system do not depend on what else is asked; all that were ever added are kept.

    Raises:
        DataError: another process holds the folder, it holds a run with other settings or of unknown ones, or it
            cannot be made.
    """
    lock = FileLock(out / ".lock")
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise DataError(
            "another process is writing into the output folder", got=out, hint="Wait for it, or give another --out"
        ) from error
    except OSError as error:
        raise DataError("the output folder cannot be written", got=f"{out}: {error.strerror}") from error
    try:
        _claim(out, json.loads(json.dumps(settings)))
        yield
    finally:
        lock.release()


def _claim(out: Path, settings: dict[str, Any]) -> None:
    path = out / SETTINGS
    hint = f"Give another --out, or delete {out} to begin anew"
    if path.exists():
        try:
            was = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise DataError(f"{path} is damaged", got=error, hint=hint) from error
        now = {**settings, SYSTEMS: {**was.get(SYSTEMS, {}), **settings.get(SYSTEMS, {})}}
        kept = {**now, SYSTEMS: {name: now[SYSTEMS][name] for name in was.get(SYSTEMS, {})}}
        if not (changes := differences({SYSTEMS: {}, **was}, kept)):
            settings = now
        elif any((out / name).exists() for name in (ROWS, LATENCY)):
            raise DataError("the output folder holds a run with other settings", got="; ".join(changes), hint=hint)
        else:
            for decided in (*out.glob(DECISIONS), *out.glob(ROUTERS.format("*"))):
                decided.unlink()
    elif left := [name for name in (ROWS, LATENCY) if (out / name).exists()]:
        raise DataError(f"the output folder holds {' and '.join(left)} but no {SETTINGS}", got=out, hint=hint)
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(settings, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(partial, path)


def differences(was: object, now: object, key: str = "") -> list[str]:
    """What differs between two JSON values, as "key was x, is y", down to the entries of objects."""
    if isinstance(was, dict) and isinstance(now, dict):
        keys = [*was, *(k for k in now if k not in was)]
        found = [differences(was.get(k, _ABSENT), now.get(k, _ABSENT), f"{key}.{k}" if key else k) for k in keys]
        return [change for part in found for change in part]
    return [] if was == now else [f"{key or 'settings'} was {_short(was)}, is {_short(now)}"]


def _short(value: object) -> str:
    text = value if value is _ABSENT else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
