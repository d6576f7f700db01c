"""docs/training.md says what is true: all fields with their defaults, and recipes that can be read."""

import re
import shlex
import tomllib
from itertools import pairwise
from pathlib import Path

import pytest
from pydantic import BaseModel

from cache2cache.fuser.base import kind_class
from cache2cache.train.config import DataPart, FuserPart, ObjectivePart, OptimPart, Recipe, Source, WatchPart
from cache2cache.train.recipes import read_recipe

ROOT = Path(__file__).parents[3]
TEXT = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```toml\n(.*?)^```", TEXT, re.M | re.S)


def defaults(model: type[BaseModel]) -> dict[str, object]:
    return {name: None if field.is_required() else field.default for name, field in model.model_fields.items()}


def expected() -> dict[str, object]:
    """Dotted field → default, of everything in a recipe but its sources and sizes."""
    gate = FuserPart().gate.model_dump()
    parts = {"fuser": FuserPart, "data": DataPart, "objective": ObjectivePart, "optim": OptimPart, "watch": WatchPart}
    found = {name: value for name, value in defaults(Recipe).items() if name not in parts}
    for part, model in parts.items():
        found |= {f"{part}.{name}": value for name, value in defaults(model).items() if name != "gate"}
    return found | {f"fuser.gate.{name}": value for name, value in gate.items()}


def table(heading: str) -> dict[str, str]:
    """Field → default as text, of the first table behind a heading."""
    behind = TEXT[TEXT.index(heading) :]
    rows = re.search(r"\| field \| default \| \|\n\|---\|---\|---\|\n((?:\|.*\n)+)", behind)
    assert rows
    cells = [[cell.strip(" `") for cell in line.split("|")[1:3]] for line in rows[1].splitlines()]
    return dict(cells)


@pytest.mark.parametrize(
    ("heading", "fields"),
    [
        ("\n## All fields\n", expected()),
        ("\nA source:\n", defaults(Source)),
        ('\nOf `kind = "compact"`:\n', defaults(kind_class("compact").Sizes)),
        ('\nOf `kind = "paper"`:\n', defaults(kind_class("paper").Sizes)),
    ],
    ids=["recipe", "source", "compact", "paper"],
)
def test_every_field_is_listed_with_its_default(heading, fields):
    listed = table(heading)
    assert set(fields) == set(listed)
    for name, text in listed.items():
        value = None if text in ("", "none") else tomllib.loads(f"value = {text}")["value"]
        assert (tuple(value) if isinstance(value, list) else value) == fields[name], name


@pytest.mark.parametrize("text", RECIPES)
def test_its_recipes_can_be_read(text, tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text(text.replace('extends = "../demo', f'extends = "{ROOT}/recipes/demo'), encoding="utf-8")
    assert read_recipe(path).sharer == "qwen2.5-coder-1.5b"


def test_its_overrides_can_be_read():
    (command,) = re.findall(r"^c2c train (recipes/demo/recipe.toml --set.*\n.*--set.*)$", TEXT, re.M)
    words = shlex.split(command.replace("\\\n", " "))
    read = read_recipe(ROOT / words[0], [value for option, value in pairwise(words) if option == "--set"])
    assert (read.receiver, read.optim.epochs, read.data.train[0].limit) == ("qwen2.5-coder-0.5b", 1, 100)
    assert (read.watch.report_to, read.fuser.fuse_last) == ((), None)
