"""What is wrong with a recipe's fields, in words: all of it at once, with the names that were perhaps meant."""

from __future__ import annotations

import difflib
import inspect
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from cache2cache.fuser.base import KINDS, kind_class
from cache2cache.train.config import FuserPart, Recipe

_SHOWN = 60

_Path = tuple[str | int, ...]


def faults(document: dict[str, Any]) -> list[str]:
    """What keeps a document from being a `Recipe`, the sizes of its fuser's kind included; empty if nothing does."""
    found = _faults(Recipe, document, ())
    fuser = document.get("fuser", {})
    if isinstance(fuser, dict):
        kind, sizes = fuser.get("kind", FuserPart().kind), fuser.get("sizes", {})
        if isinstance(kind, str) and kind in KINDS and isinstance(sizes, dict):
            found += _faults(kind_class(kind).Sizes, sizes, ("fuser", "sizes"))
    return found


def _faults(model: type[BaseModel], document: dict[str, Any], prefix: _Path) -> list[str]:
    try:
        model.model_validate(document)
    except ValidationError as error:
        said: dict[_Path, list[str]] = defaultdict(list)
        unknown: dict[_Path, list[str]] = defaultdict(list)
        for fault in error.errors():
            if fault["type"] == "too_short" and fault["input"]:
                continue  # pydantic counts the entries that are right; the others have faults of their own
            path = _path(fault["loc"], document, missing=fault["type"] == "missing")
            if fault["type"] == "extra_forbidden":
                unknown[path[:-1]].append(str(path[-1]))
            else:
                # Branches of a union complain one by one about the same value.
                said[path].append(_message(fault["msg"], fault["input"]))
        return [f"{_dotted(prefix + path) or 'recipe'}: {' or: '.join(texts)}" for path, texts in said.items()] + [
            _unknown(names, prefix + path, _model_at(model, path)) for path, names in unknown.items()
        ]
    return []


def _path(loc: _Path, document: Any, *, missing: bool) -> _Path:
    """The keys of a fault that are a document's; pydantic also names the branch of a union."""
    path = []
    for part in loc:
        try:
            document = document[part]
        except (LookupError, TypeError):
            continue
        path.append(part)
    return (*path, loc[-1]) if missing else tuple(path)


def _message(text: str, got: Any) -> str:
    text = text.removeprefix("Value error, ")
    if isinstance(got, dict):
        return text
    got = repr(got)
    return f"{text} (got {got if len(got) <= _SHOWN else got[:_SHOWN] + '…'})"


def _unknown(names: Sequence[str], path: _Path, model: type[BaseModel]) -> str:
    """The unknown fields of one table, and its known ones."""
    table = _dotted(path)
    words = [f"{name}{_meant(name, table, model)}" for name in names]
    return f"{table or 'recipe'}: unknown {', '.join(words)}, known are {', '.join(model.model_fields)}"


def _meant(name: str, table: str, model: type[BaseModel]) -> str:
    """The field that was perhaps meant: the same name in another table before a similar one in this."""
    here = {field: _dotted((table, field)) for field in model.model_fields}
    # Of tables that have the same field the outermost counts, which comes first.
    tables = reversed(list(_tables(Recipe, "")))
    there = {field: _dotted((other, field)) for other, part in tables for field in part.model_fields}
    if name in there:
        return f" (did you mean {there[name]}?)"
    for fields in (here, there):
        if close := difflib.get_close_matches(name, fields, 1):
            return f" (did you mean {fields[close[0]]}?)"
    return ""


def _tables(model: type[BaseModel], name: str) -> Iterator[tuple[str, type[BaseModel]]]:
    """All tables of a recipe that are no entries of arrays."""
    yield name, model
    for field, info in model.model_fields.items():
        if inspect.isclass(info.annotation) and issubclass(info.annotation, BaseModel):
            yield from _tables(info.annotation, _dotted((name, field)))


def _model_at(model: type[BaseModel], path: _Path) -> type[BaseModel]:
    """The model of a table, found by the path to it."""
    for part in path:
        if isinstance(part, str):  # an index stays with the model of the entries
            annotation = model.model_fields[part].annotation
            choices = [annotation, *get_args(annotation)]
            model = next(choice for choice in choices if inspect.isclass(choice) and issubclass(choice, BaseModel))
    return model


def _dotted(path: Sequence[str | int]) -> str:
    return ".".join(str(part) for part in path if part != "")
