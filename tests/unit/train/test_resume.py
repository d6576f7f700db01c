"""A run that is killed at any moment and started again ends as if nothing had happened, bit for bit."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache2cache import Fuser
from cache2cache.errors import TrainingError
from cache2cache.testing import tiny_pair
from cache2cache.train import checkpoints
from cache2cache.train.checkpoints import to_resume
from cache2cache.train.run import train
from cache2cache.train.trainer import FuserTrainer

NOISY = {"fuse_last": 8, "sizes": {"width": 16, "inner": 16, "blocks": 1, "dropout": 0.1}, "gate": {"learned": True}}
RUNS = {
    # Steps that are not a multiple of the epoch, epochs not of the checkpoints; everything that draws random numbers.
    "to its last step": {
        "fuser": NOISY,
        "optim": {"epochs": 5.5, "batch_size": 2, "accumulate": 2, "bucket": True, "sharer_dropout": 0.3},
        "watch": {"eval_steps": 3, "log_steps": 1, "keep": 1},
    },
    "until it gets no better": {
        "fuser": NOISY,
        "optim": {"epochs": 20, "learning_rate": 0.1},
        "watch": {"eval_steps": 4, "log_steps": 2, "keep": 2, "patience": 2},
    },
    "on a stream": {
        "data": {"stream": True, "shuffle_buffer": 5},
        "optim": {"max_steps": 22},
        "watch": {"eval_steps": 4, "log_steps": 4, "keep": 1},
    },
}


def log(output: Path) -> list[dict]:
    """Everything that was logged, without what a clock said."""
    checkpoint = to_resume(output)
    assert checkpoint is not None
    entries = json.loads(checkpoint.state_file.read_text())["log_history"]
    return [{k: v for k, v in entry.items() if "runtime" not in k and "per_second" not in k} for entry in entries]


def assert_same(whole: Path, cut: Path) -> None:
    assert log(whole) == log(cut)
    theirs = Fuser.from_pretrained(cut / "fuser")
    ours = Fuser.from_pretrained(whole / "fuser")
    assert ours.config == theirs.config, "the summary is part of it"
    for name, tensor in ours.state_dict().items():
        assert torch.equal(tensor, theirs.state_dict()[name]), name


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_killed_again_and_again_ends_the_same(data, recipe, tmp_path, name):
    folders = [tmp_path / side for side in ("receiver", "sharer")]
    for lm, folder in zip(tiny_pair(), folders, strict=True):
        lm.model.save_pretrained(folder)
        lm.tokenizer.save_pretrained(folder)
    parts = RUNS[name] | dict(zip(("receiver", "sharer"), map(str, folders), strict=True))
    parts["watch"] = parts["watch"] | {"report_to": []}
    (tmp_path / "recipe.json").write_text(recipe(**parts).model_dump_json())
    program = [sys.executable, Path(__file__).with_name("killed_run.py"), tmp_path, "0"]
    done = subprocess.run(program, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[1]) >= 8, "every chosen place killed it"
    assert_same(tmp_path / "whole", tmp_path / "cut")


class Killed(BaseException):
    """In the place of SIGKILL, for what is tried within this process."""


@pytest.mark.parametrize("step", [5, 8, 14])
def test_an_interrupted_run_ends_with_the_same_weights(models, recipe, machine, tmp_path, monkeypatch, step):
    noisy = recipe(fuser=NOISY, optim={"sharer_dropout": 0.3, "epochs": 4}, watch={"eval_steps": 4, "log_steps": 2})
    train(noisy, tmp_path / "whole", machine)
    training_step, calls = FuserTrainer.training_step, []

    def dying(self, *args, **kwargs):
        calls.append(1)
        if len(calls) > step:
            raise Killed
        return training_step(self, *args, **kwargs)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(FuserTrainer, "training_step", dying)
        train(noisy, tmp_path / "cut", machine)
    train(noisy, tmp_path / "cut", machine, resume=True)
    assert_same(tmp_path / "whole", tmp_path / "cut")


def test_a_finished_run_can_be_resumed_without_a_step(models, recipe, machine, tmp_path, monkeypatch):
    whole = recipe(optim={"epochs": 2})
    summary = train(whole, tmp_path / "out", machine)
    before = (tmp_path / "out" / "fuser" / "fuser.safetensors").read_bytes()
    monkeypatch.setattr(FuserTrainer, "training_step", lambda *_: pytest.fail("a step too many"))
    assert train(whole, tmp_path / "out", machine, resume=True) == summary
    assert (tmp_path / "out" / "fuser" / "fuser.safetensors").read_bytes() == before


def test_a_run_does_not_go_on_without_its_best_weights(models, recipe, machine, tmp_path):
    """It would end with the last ones and call them the best."""
    standing_still = recipe(optim={"epochs": 4, "learning_rate": 1e-20}, watch={"eval_steps": 4, "keep": 1})
    train(standing_still, tmp_path / "out", machine)
    newest = to_resume(tmp_path / "out")
    assert newest is not None and newest.best_step < newest.step
    best = tmp_path / "out" / f"checkpoint-{newest.best_step}"
    weights = next(best.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1])
    for said in ("is damaged", "is gone"):
        with pytest.raises(TrainingError, match=f"{best.name} {said}.*begin anew"):
            train(standing_still, tmp_path / "out", machine, resume=True)
        shutil.rmtree(best, ignore_errors=True)


def test_a_streams_other_rows_are_refused(models, recipe, machine, tmp_path, monkeypatch):
    streamed = recipe(data={"stream": True}, optim={"max_steps": 8})
    train(streamed, tmp_path / "out", machine)
    path = machine.data_dir / "train.jsonl"
    path.write_text(path.read_text().replace("number 3,", "number 33,"))
    with pytest.raises(TrainingError, match="no longer those that the run began with"):
        train(streamed, tmp_path / "out", machine, resume=True)


def test_another_number_of_processes_is_refused(models, recipe, machine, tmp_path):
    whole = recipe(optim={"epochs": 2})
    train(whole, tmp_path / "out", machine)
    checkpoint = to_resume(tmp_path / "out")
    assert checkpoint is not None
    checkpoints.complete(checkpoint.folder, 2, checkpoint.rows)
    with pytest.raises(TrainingError, match="number of processes.*got 1; allowed: 2"):
        train(whole, tmp_path / "out", machine, resume=True)


@pytest.mark.parametrize("name", ["train.jsonl", "dev.jsonl"])
def test_nothing_goes_on_with_other_rows(models, recipe, machine, data, tmp_path, name):
    whole = recipe(optim={"epochs": 2})
    train(whole, tmp_path / "out", machine)
    lines = (data / name).read_text().splitlines(keepends=True)
    (data / name).write_text("".join([lines[1], lines[0], *lines[2:]]))
    with pytest.raises(TrainingError, match="rows are no longer those that the run began with"):
        train(whole, tmp_path / "out", machine, resume=True)
    (data / name).write_text("".join(lines))
    train(whole, tmp_path / "out", machine, resume=True)
