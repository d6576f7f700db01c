"""Recipes on disk: TOML files that may extend one another, and fields set for one run."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cache2cache.errors import RecipeError
from cache2cache.evaluate import folder
from cache2cache.train.config import Recipe
from cache2cache.train.faults import faults

_EXTENDS, _UNSET = "extends", "unset"
_QUOTING = "[{\"'"
"""What arrays, inline tables and strings begin with in TOML."""


def read_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read and check a recipe.

    A file may extend another one, `extends = "../demo/recipe.toml"`, relative to itself: tables are merged key by key, all
    the way down; arrays and scalars take the place of the other's. `unset = ["fuser.fuse_last"]` takes keys of the other
    back to their defaults first.

    Args:
        overrides: `key=value` each, applied in order after all files. Keys are dotted, with indices into arrays
            (`data.train.0.limit=100`); values are TOML, or else taken as strings; without a value the key is unset.

    Raises:
        RecipeError: no such file, not TOML, files that extend each other in a circle, or fields that are wrong, of which
            all are listed.
    """
    path = Path(path)
    document = _document(path, ())
    wrong = [fault for text in overrides if (fault := _override(document, text))]
    wrong += faults(document)
    if wrong:
        raise RecipeError(f"{path} is no recipe that can be run", got="; ".join(wrong))
    return Recipe.model_validate(document)


def differences(was: Recipe, now: Recipe) -> list[str]:
    """What differs between two recipes, as "optim.epochs was 3, is 2"."""
    return folder.differences(*(_indexed(recipe.model_dump(mode="json")) for recipe in (was, now)))


def _indexed(value: Any) -> Any:
    """Arrays as tables from index to entry, so that a difference names the entry."""
    if isinstance(value, dict):
        return {key: _indexed(entry) for key, entry in value.items()}
    return {str(i): _indexed(entry) for i, entry in enumerate(value)} if isinstance(value, list) else value


def _document(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    """The tables of a file, merged into those of the file that it extends."""
    chain = (*extended_by, path)
    if path.resolve() in (other.resolve() for other in extended_by):
        raise RecipeError("recipes extend each other in a circle", got=" → ".join(map(str, chain)))
    document = _parsed(path, extended_by)
    base, unset = document.pop(_EXTENDS, None), document.pop(_UNSET, [])
    if not isinstance(base, str | None):
        raise RecipeError(f"extends in {path} is no path", got=repr(base), allowed="one .toml file")
    if not (isinstance(unset, list) and all(isinstance(key, str) for key in unset)):
        raise RecipeError(f"unset in {path} is no list of keys", got=repr(unset), allowed='such as ["fuser.fuse_last"]')
    if base is None:
        if unset:
            raise RecipeError(f"{path} unsets keys but extends no recipe", got=", ".join(unset))
        return document
    below = _document(path.parent / base, chain)
    for key in unset:
        try:
            _remove(below, key)
        except LookupError as error:
            raise RecipeError(f"{path} unsets a key that {base} does not set", got=f"{key}: {error.args[0]}") from error
    return _merged(below, document)


def _parsed(path: Path, extended_by: tuple[Path, ...]) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        by = f", which {extended_by[-1]} extends" if extended_by else ""
        got = f"{path}{by}: {error.strerror}"
        raise RecipeError("no such recipe", got=got, allowed="a .toml file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path} is not TOML", got=str(error)) from error


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    out = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(below.get(key), dict)
        out[key] = _merged(below[key], value) if both else value
    return out


def _override(document: dict[str, Any], text: str) -> str | None:
    """Set one field from `key=value`; what is wrong with it, if anything is."""
    key, equals, value = text.partition("=")
    key, value = key.strip(), value.strip()
    if not equals or not all(key.split(".")):
        return f"--set {text}: not of the form key=value"
    try:
        if not value:
            _remove(document, key)
            return None
        holder, at = _find(document, key, make=True)
        holder[at] = _value(value)
    except LookupError as error:
        return f"--set {text}: {error.args[0]}"
    except tomllib.TOMLDecodeError as error:
        return f"--set {text}: the value is not TOML ({error})"
    return None


def _value(text: str) -> Any:
    """A value as TOML, or a bare word, such as a model's name, as it is."""
    try:
        parsed = tomllib.loads(f"value = {text}")
    except tomllib.TOMLDecodeError:
        if text[0] in _QUOTING:  # meant as TOML, so it would be wrong to take it as a string
            raise
        return text
    return parsed["value"] if len(parsed) == 1 else text


def _remove(document: dict[str, Any], key: str) -> None:
    """Take out a dotted key; LookupError if it is not there."""
    holder, at = _find(document, key, make=False)
    if isinstance(holder, dict) and at not in holder:
        raise LookupError(f"{at} is not set")
    del holder[at]


def _find(document: dict[str, Any], key: str, *, make: bool) -> tuple[Any, str | int]:
    """The table or array that holds a dotted key, and the last part of it; LookupError if there is none.

    Args:
        make: tables that are not there yet.
    """
    *tables, last = key.split(".")
    holder: Any = document
    for table in tables:
        at = _part(holder, table)
        if isinstance(holder, dict) and at not in holder:
            if not make:
                raise LookupError(f"{table} is not set")
            holder[at] = {}
        holder = holder[at]
    return holder, _part(holder, last)


def _part(holder: Any, part: str) -> str | int:
    if isinstance(holder, list):
        if not (part.isascii() and part.isdigit() and int(part) < len(holder)):
            raise LookupError(f"{part} is none of the entries 0 to {len(holder) - 1}")
        return int(part)
    if not isinstance(holder, dict):
        raise LookupError(f"{part} would lie inside of {holder!r}, which is no table")
    return part
