"""A plan promises what a run then takes, starts nothing and needs no weights."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from cache2cache.errors import C2CError, UnknownModelError
from cache2cache.fuser.gate import GateConfig
from cache2cache.inputs import Row, SharerRow
from cache2cache.models import catalogue
from cache2cache.models.catalogue import Model, Weights
from cache2cache.testing import tiny_model, tiny_pair
from cache2cache.train import costs, gauge
from cache2cache.train.batch import TrainRow
from cache2cache.train.features import FeatureDataset, precompute
from cache2cache.train.plan import Plan, plan
from cache2cache.train.prepare import load_pair, prepare_rows
from cache2cache.train.run import train
from cache2cache.train.workload import Schedule, fetching


@pytest.fixture(autouse=True)
def _hasty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Times are measured twice only: no test looks at them."""
    monkeypatch.setattr(gauge, "_ENOUGH_SECONDS", 0.0)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, str]:
    """The tiny pair on disk, without weights."""
    found = {}
    for side, lm in zip(("receiver", "sharer"), tiny_pair(), strict=True):
        folder = tmp_path / f"tiny-{side}"
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
        (folder / "model.safetensors").unlink()
        found[side] = str(folder)
    return found


def test_a_plan_says_what_a_run_then_takes(models, recipe, machine, folders, tmp_path):
    """Models are known by the last part of a folder's path, so the plan's folders and the run's models share features."""
    before = contents(tmp_path)
    promised = plan(recipe(**folders, watch={"keep": 1}), machine)
    assert contents(tmp_path) == before, "a plan writes nothing"
    summary = train(recipe(watch={"keep": 1}), tmp_path / "out", machine)
    assert promised.counts["training rows"] == summary["rows"]
    assert promised.counts["validation rows"] == summary["validation_rows"]
    assert promised.counts["optimizer steps"] == summary["steps"]
    assert promised.disk["prefills"] == tensors_in(machine.features)
    one = next((tmp_path / "out").glob("checkpoint-*"))
    state = torch.load(one / "optimizer.pt", weights_only=True)["state"].values()
    moments = sum(tensor.nbytes for x in state for name, tensor in x.items() if name != "step")
    assert promised.disk["checkpoints"] == 2 * (moments + tensors_in(one))
    assert promised.disk["fuser"] == tensors_in(tmp_path / "out" / "fuser")
    again = plan(recipe(**folders), machine)
    assert again.disk["prefills"] == again.time["prefills"] == 0, "what is there already is not counted"
    (theirs,) = machine.features.glob("tiny-sharer-*")
    size = tensors_in(theirs)
    shutil.rmtree(theirs)
    assert plan(recipe(**folders), machine).disk["prefills"] == size > 0, "one side's alone is"


def test_distributions_of_the_sharer(models, recipe, machine, folders):
    distilled = recipe(objective={"distill": 1.0, "distill_top": 8})
    promised = plan(recipe(**folders, objective={"distill": 1.0, "distill_top": 8}), machine)
    precompute(distilled, machine)
    teachers = next(x for x in machine.features.iterdir() if x.name.startswith("teacher-"))
    response_tokens = promised.counts["response tokens"]
    assert promised.disk["distributions of the sharer"] == 8 * 8 * response_tokens <= tensors_in(teachers)
    assert promised.time["distributions of the sharer"] > 0
    again = plan(recipe(**folders, objective={"distill": 1.0, "distill_top": 8}), machine)
    assert again.disk["distributions of the sharer"] == again.time["distributions of the sharer"] == 0
    unkept = dataclasses.replace(machine, features=None)
    held = plan(recipe(**folders, objective={"distill": 1.0, "distill_top": 8}), unkept)
    assert held.memory["distributions of the sharer"] == 8 * 12 * response_tokens


def test_reading_features_is_measured_where_there_are_some(models, recipe, machine):
    pair = load_pair(recipe(), machine)
    rows = prepare_rows(recipe(), pair, machine).train
    assert fetching(pair, rows, machine.features) == 0
    FeatureDataset(rows[:1], pair, machine.features)
    assert fetching(pair, rows, machine.features) > 0


def contents(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*"))


def tensors_in(folder: Path) -> int:
    """Bytes of all tensors of a folder, the positions of partial prefills aside."""
    found = 0
    for path in folder.rglob("*.safetensors"):
        found += sum(x.nbytes for name, x in load_file(path).items() if not name.endswith(".positions"))
    return found


@pytest.mark.parametrize(
    "parts",
    [
        {"fuser": {"kind": "paper", "sizes": {"hidden_dim": 16, "intermediate_dim": 24}}},
        {"fuser": {"gate": GateConfig()}},
        {"fuser": {"gate": GateConfig(learned=False, initial_logit=1.0, layers=(1,), kinds=("values",))}},
        {"fuser": {"alignment": "retokenise-longest", "fuse_last": None}},
        {"fuser": {"layer_map": (0, 2)}},
        {"objective": {"distill": 0.5, "contrastive": 0.5}},
        {"optim": {"sharer_dropout": 0.5, "precision": "bfloat16", "gradient_checkpointing": True}},
        {"optim": {"accumulate": 3, "bucket": True, "compile": True}},
        {"optim": {"max_steps": 20}, "data": {"stream": True}},
        {"dtype": "bfloat16"},
    ],
    ids=lambda parts: next(iter(parts)) + " " + next(iter(dict.fromkeys(map(str, parts.values())))),
)
def test_every_kind_of_recipe_can_be_planned(recipe, machine, folders, parts):
    found = plan(recipe(**folders, **parts), machine)
    for amounts in (found.memory, found.time, found.disk):
        assert all(amount >= 0 for amount in amounts.values()) and sum(amounts.values()) > 0
    assert found.time["steps"] > 0 and found.time["validations"] > 0


def working(found: Plan) -> float:
    return found.memory["activations, gradients, optimizer"]


def test_memory_follows_the_recipe(recipe, machine, folders, monkeypatch):
    """Statistics of the first rows, which do not depend on what is varied, would hide it."""
    monkeypatch.setattr("cache2cache.train.plan.STATISTICS_ROWS", 1)

    def of(**parts: Any) -> float:
        return working(plan(recipe(**folders, **parts), dataclasses.replace(machine, features=None)))

    small = of()
    assert small == of(), "the same recipe, the same memory"
    assert of(optim={"batch_size": 8}) > 1.5 * small
    assert of(objective={"contrastive": 1.0}) > small
    assert of(fuser={"fuse_last": 2}) < small
    assert of(fuser={"sizes": {"width": 64, "inner": 64, "blocks": 1}}) > small


def test_models_are_counted_once_and_in_their_dtype(recipe, machine, folders):
    machine = dataclasses.replace(machine, features=None)
    pair = plan(recipe(**folders), machine).memory
    halves = plan(recipe(**folders, dtype="bfloat16"), machine).memory
    for side in ("receiver on cpu", "sharer on cpu"):
        assert pair[side] == 2 * halves[side]
    alone = plan(recipe(receiver=folders["receiver"], sharer=folders["receiver"]), machine).memory
    assert alone["receiver on cpu"] == pair["receiver on cpu"] and alone["sharer on cpu"] == 0


def test_a_sharer_and_training_are_not_in_memory_at_once(recipe, machine, folders, monkeypatch):
    """Where prefills are kept, the fullest moment is one or the other."""
    monkeypatch.setattr("cache2cache.train.plan.STATISTICS_ROWS", 1)
    live = dataclasses.replace(machine, features=None)
    theirs = plan(recipe(**folders), live).memory["sharer on cpu"]
    small, large = (plan(recipe(**folders, optim={"batch_size": size}), machine).memory for size in (1, 16))
    assert small["sharer on cpu"] == theirs and large["sharer on cpu"] == 0
    assert large["activations, gradients, optimizer"] > theirs


def test_without_a_folder_prefills_are_part_of_the_steps(recipe, machine, folders):
    live = plan(recipe(**folders), dataclasses.replace(machine, features=None))
    assert live.disk["prefills"] == live.time["prefills"] == 0


def test_a_model_that_is_not_here(recipe, machine, folders, monkeypatch):
    """Sizes from the catalogue; its tokens are estimated, and the plan says so."""
    config = tiny_model("llama").model.config.to_dict()
    weights = Weights((), "", joined=1, download=5_000_000, converted=7_000_000)
    far = Model("far", "nobody/far", "MIT", "https://example.org", "", weights, config=config)
    monkeypatch.setitem(catalogue.MODELS, "far", far)
    found = plan(recipe(**folders | {"sharer": "far"}), machine)
    assert found.disk["models"] == 7_000_000
    assert any("far is not here yet (5 MB to fetch)" in note for note in found.notes)
    near = plan(recipe(**folders), machine)
    assert near.disk["models"] == 0 and not any("not here" in note for note in near.notes)


def test_what_a_plan_leaves_out_is_said(recipe, machine, folders):
    notes = plan(recipe(**folders, optim={"compile": True, "max_steps": 9}, data={"stream": True}), machine).notes
    assert [any(word in note for note in notes) for word in ("uncompiled", "first 256 rows", "50 validations")] == [
        True
    ] * 3


def test_a_plan_as_a_table():
    found = Plan(
        {"training rows": 4000}, {"sharer": 3.5e9, "fuser": 4e7}, {"steps": 3723.4, "prefills": 0.0}, {}, ("so",)
    )
    assert found.rows() == [
        ("", "training rows", "4,000"),
        ("memory", "in all", "3.54 GB"), ("", "sharer", "3.50 GB"), ("", "fuser", "0.04 GB"),
        ("time", "in all", "1:02:03"), ("", "steps", "1:02:03"),
        ("disk", "in all", "0.00 GB"),
        ("note", "so", ""),
    ]  # fmt: skip


def test_unknown_models_are_named(recipe, machine):
    with pytest.raises(UnknownModelError, match="tiny-receiver"):
        plan(recipe(), machine)


def test_a_deep_model_is_measured_on_a_few_layers(recipe, machine, tmp_path, monkeypatch):
    """Memory is a line in the depth, so a plan from 2 and 3 layers is that from all 6."""
    names = {"receiver": str(tmp_path / "deep-receiver"), "sharer": str(tmp_path / "deep-sharer")}
    for family, name in zip(("qwen3", "llama"), names.values(), strict=True):
        lm = tiny_model(family, num_hidden_layers=6)
        lm.model.save_pretrained(name)
        lm.tokenizer.save_pretrained(name)
    whole = plan(recipe(**names), machine)
    monkeypatch.setattr(costs, "depths", lambda lm: (2, 3))
    scaled = plan(recipe(**names), machine)
    assert working(scaled) == pytest.approx(working(whole), rel=0.05)


@pytest.mark.parametrize(
    ("rows", "optim", "steps", "passes", "validations"),
    [
        (16, {"batch_size": 4, "epochs": 6}, 24, 24, 6),
        (17, {"batch_size": 4, "epochs": 2}, 10, 10, 3),
        (20, {"batch_size": 4, "accumulate": 2, "epochs": 2}, 6, 10, 2),  # 5 batches make 3 steps
        (16, {"batch_size": 4, "epochs": 0.6}, 3, 3, 1),
        (16, {"batch_size": 4, "max_steps": 7}, 7, 7, 2),
        (3, {"batch_size": 4, "epochs": 1}, 1, 1, 1),
    ],
)
def test_steps_and_passes(recipe, rows, optim, steps, passes, validations):
    found = Schedule.of(recipe(optim=optim, watch={"eval_steps": 4}), [row_of(5)] * rows, [row_of(5)] * 9)
    assert (found.steps, found.passes) == (steps, passes)
    assert found.validations == validations
    assert found.validation_passes == pytest.approx(validations * 9 / min(rows, 4))
    assert found.checkpoints(keep=1) == min(2, validations)


def test_typical_and_largest_batch(recipe):
    rows = [row_of(length) for length in [10] * 7 + [90]]
    found = Schedule.of(recipe(optim={"batch_size": 1}), rows, rows[:1])
    assert [len(row.row.ids) for row in (*found.typical, *found.largest)] == [10, 90]
    assert all(len(batch) == 3 for batch in vars(Schedule.of(recipe(optim={"batch_size": 3}), rows, rows[:3])).values()
               if isinstance(batch, list)), "a last, smaller batch is neither"  # fmt: skip


def test_longer_validation_rows_take_longer(recipe):
    short, long = [row_of(10)] * 16, [row_of(90)] * 16
    same, longer = (Schedule.of(recipe(), short, validation) for validation in (short, long))
    assert longer.validation_passes > 4 * same.validation_passes
    assert [len(row.row.ids) for row in longer.judged] == [90] * 4


def test_a_fuser_to_begin_with_is_looked_at(recipe, machine, folders):
    with pytest.raises(C2CError, match="no/such"):
        plan(recipe(**folders, fuser={"init": "./no/such"}), machine)


def row_of(length: int) -> TrainRow:
    due = np.zeros(length, dtype=np.int64)
    due[-3:-1] = length - 1
    sharer = SharerRow(np.arange(length), np.arange(length), due)
    return TrainRow(Row(np.arange(length), (sharer,)), np.arange(2), "a")
