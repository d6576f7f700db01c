"""The ablations: every recipe can be run and changes one thing of the base, and what is made of their answers is right."""

import importlib.util
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

from cache2cache.errors import DataError
from cache2cache.evaluate import folder, stats
from cache2cache.evaluate.rowfile import RecordFile
from cache2cache.evaluate.schema import Report, RowRecord
from cache2cache.fuser.base import Fuser
from cache2cache.testing import random_fuser, tiny_tokenizer
from cache2cache.text.chat import render
from cache2cache.train.config import Recipe
from cache2cache.train.prepare import new_config
from cache2cache.train.recipes import differences, read_recipe

FOLDER = Path(__file__).parents[3] / "recipes" / "ablations"
NAMES = sorted(path.stem for path in FOLDER.glob("*.toml"))
TOGETHER = {
    "fuser.kind": ("fuser.sizes", "fuser.gate"),
    "fuser.alignment": ("fuser.fuse_last",),
    "data.train": ("watch", "optim.epochs"),
    "optim.epochs": ("watch",),
    "objective.distill": ("objective.response",),
}
"""What goes with a change: a kind has its own sizes and gates, published alignments fuse whole messages, and other numbers of
steps are validated at other steps."""


def recipe(name: str) -> Recipe:
    return read_recipe(FOLDER / f"{name}.toml")


@pytest.fixture(scope="module")
def run() -> ModuleType:
    spec = importlib.util.spec_from_file_location("ablations", FOLDER / "run.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_there_are_recipes():
    assert "base" in NAMES and len(NAMES) > 40


@pytest.mark.parametrize("name", [name for name in NAMES if name != "base"])
def test_an_ablation_changes_one_thing(name: str):
    changed = {".".join(line.split()[0].split(".")[:2]) for line in differences(recipe("base"), recipe(name))}
    changed = {"fuser.sizes" if key.startswith("fuser.sizes") else key for key in changed}
    for cause, effects in TOGETHER.items():
        if cause in changed:
            changed = {key for key in changed if not key.startswith(effects)}
    assert len(changed) == 1


@pytest.mark.parametrize("name", NAMES)
def test_its_fuser_fits_the_pair(name: str):
    part = recipe(name).fuser
    demo = Fuser.from_pretrained("demo").config
    with torch.device("meta"):
        fuser = Fuser.from_config(new_config(recipe(name), demo.receiver, demo.sharer))
    assert fuser.speaks()
    for template in (part.receiver_template, part.sharer_template):
        assert (
            render(tiny_tokenizer(), [{"role": "user", "content": "Which?"}], template=template).text.count("Which?")
            == 1
        )


@pytest.mark.parametrize("name", NAMES)
def test_its_last_step_is_validated(name: str):
    whole = recipe(name)
    per_epoch = -(-sum(source.limit or 0 for source in whole.data.train) // whole.optim.batch_size)
    assert per_epoch * whole.optim.epochs % whole.watch.eval_steps == 0


# --- what is made of the answers -----------------------------------------------------------------------------------

SHARE = {"c2c": (0.9, 0.6, 0.7), "mismatched": (0.4, 0.5, 0.6), "zeroed": (0.3, 0.3, 0.3)}
"""System → probability of the right letter in three rows."""


@pytest.fixture
def finished(tmp_path: Path, receiver, sharer):
    """Write a folder as it is left by an ablation."""

    def write(name: str, share: dict[str, tuple[float, ...]], limit: int = 3) -> Path:
        out = tmp_path / name
        random_fuser(receiver, sharer, training={"steps": 126}).save_pretrained(out / "fuser")
        (out / "recipe.json").write_text(recipe(name).model_dump_json())
        asked = out / "held-out"
        asked.mkdir()
        with RecordFile(asked / folder.ROWS, RowRecord) as file:
            file.append(
                [
                    RowRecord(
                        task=("arc_easy_dev", "openbookqa_dev", "mmlu_redux")[i], id=str(i), subject="s", system=system,
                        target="B", metrics={"likelihood": float(p > 0.5)}, letter_logprobs=[math.log(1 - p), math.log(p)],
                    )
                    for system, shares in share.items()
                    for i, p in enumerate(shares)
                ]
            )  # fmt: skip
        report = Report(run={"limit": limit, "fuser_parameters": [1234]}, tasks={}, latency={})
        (asked / "report.json").write_text(report.model_dump_json())
        return out

    return write


def test_results_are_over_rows_trained_on_and_unseen(run: ModuleType, finished):
    line = run.result("base", finished("base", SHARE), {})
    assert (line["recipe"], line["parameters"], line["training"]) == ("base", 1234, {"steps": 126})
    assert line["rows"]["all"]["accuracy"]["matched"] == stats.wilson([1, 1, 1]).model_dump()
    assert line["rows"]["unseen"]["accuracy"]["mismatched"] == stats.wilson([1]).model_dump()
    trained_on = line["rows"]["trained on"]
    assert trained_on["nats"]["matched"]["value"] == pytest.approx(-(math.log(0.9) + math.log(0.6)) / 2)
    assert trained_on["nats gained"]["zeroed"]["value"] == pytest.approx(
        (math.log(0.9 / 0.3) + math.log(0.6 / 0.3)) / 2
    )
    assert trained_on["accuracy gained"]["mismatched"]["value"] == 1.0
    assert "base" not in trained_on["nats gained"]


def test_all_that_was_asked_the_same_rows_is_in_the_table(run: ModuleType, finished):
    out = finished("base", SHARE).parent
    finished("width-64", SHARE | {"c2c": (0.95, 0.7, 0.8)})
    finished("width-32", SHARE, limit=5)
    run.write(out, 3)
    table = (out / "results.md").read_text().splitlines()
    assert [line.split("|")[1].strip() for line in table] == ["recipe", "---", "base", "width-64"]
    assert "+0.000" in table[2], "the base does not differ from itself"
    assert f"+{(math.log(0.95 / 0.9) + math.log(0.7 / 0.6) + math.log(0.8 / 0.7)) / 3:.3f}" in table[3]
    assert len((out / "results.jsonl").read_text().splitlines()) == 2


def test_a_fuser_of_another_recipe_is_not_taken_for_this_one(run: ModuleType, finished, tmp_path: Path):
    out = finished("base", SHARE)
    assert run.trained(recipe("base"), out)
    assert not run.trained(recipe("base"), tmp_path / "absent")
    with pytest.raises(DataError, match="fuse_last was 16, is 8"):
        run.trained(recipe("fuse-8"), out)


def test_the_readme_names_every_recipe_and_no_other():
    table = (FOLDER / "README.md").read_text(encoding="utf-8").partition("|---|---|\n")[2]
    named = {name for line in table.splitlines() for name in line.split("|")[2].strip().split(", ")}
    assert named == set(NAMES)
