"""A small run: questions whose answer is the choice that says so, and the tiny pair."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cache2cache.models.load import LanguageModel
from cache2cache.testing import tiny_pair
from cache2cache.train.config import Machine, Recipe

_RECIPE: dict[str, Any] = {
    "receiver": "tiny-receiver",
    "sharer": "tiny-sharer",
    "fuser": {"fuse_last": 8, "sizes": {"width": 16, "inner": 16, "blocks": 1}},
    "data": {"train": [{"path": "train.jsonl"}], "validation": [{"path": "dev.jsonl"}]},
    "optim": {"epochs": 6, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2},
    "watch": {"eval_steps": 8, "log_steps": 4, "patience": 50, "report_to": []},
}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A data folder: train.jsonl with 16 questions, dev.jsonl with 8 others."""
    draw = random.Random(0)
    rows = []
    for i in range(24):
        answer = draw.randrange(4)
        choices = ["yes" if k == answer else "no" for k in range(4)]
        rows.append({"question": f"number {i}, which?", "choices": choices, "answer": answer})
    folder = tmp_path / "data"
    folder.mkdir()
    for name, part in (("train", rows[:16]), ("dev", rows[16:])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.fixture
def recipe() -> Callable[..., Recipe]:
    """A recipe of six epochs, 24 steps; keywords are parts whose fields to change: `recipe(optim={"epochs": 2})`."""

    def changed(**parts: Any) -> Recipe:
        document = dict(_RECIPE)
        for name, part in parts.items():
            document[name] = _RECIPE.get(name, {}) | part if isinstance(part, dict) else part
        return Recipe.model_validate(document)

    return changed


@pytest.fixture
def machine(data: Path, tmp_path: Path) -> Machine:
    """Where the run happens: features are kept."""
    return Machine(data_dir=data, features=tmp_path / "features", device="cpu")


@pytest.fixture
def models(monkeypatch: pytest.MonkeyPatch) -> dict[str, LanguageModel]:
    """The tiny pair, under the names of the recipe. Each run gets a sharer of its own, whose weights it may give back."""
    found = dict(zip(("tiny-receiver", "tiny-sharer"), tiny_pair(), strict=True))

    def load(name: str, **_: Any) -> LanguageModel:
        return copy.deepcopy(found[name]) if name == "tiny-sharer" else found[name]

    monkeypatch.setattr("cache2cache.train.prepare.load", load)
    return found
