"""Two processes on this machine train what one does with batches of twice the size, and go on after a kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache2cache import Fuser
from cache2cache.testing import tiny_pair
from cache2cache.train.checkpoints import to_resume

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

COMPARED = ("step", "epoch", "loss", "grad_norm", "learning_rate", "eval_loss", "eval_zeroed", "eval_accuracy")
"""Not the mismatched likelihood: the other row that is heard is one of the same batch."""


@pytest.fixture
def folder(data, tmp_path) -> Path:
    """Models and data: responses of unequal length, and validation rows that do not fill the last batches."""
    for name, lm in zip(("receiver", "sharer"), tiny_pair(), strict=True):
        lm.model.save_pretrained(tmp_path / name)
        lm.tokenizer.save_pretrained(tmp_path / name)
    for name, numbers in (("train", range(16)), ("dev", range(20, 27))):
        turns = [[f"number {i}, which?", "yes" * (1 + i * i % 5)] for i in numbers]
        chats = [[{"role": r, "content": c} for r, c in zip(("user", "assistant"), t, strict=True)] for t in turns]
        rows = "".join(json.dumps({"messages": chat}) + "\n" for chat in chats)
        (data / f"{name}.jsonl").write_text(rows)
    return tmp_path


FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "NO_WRAP",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}
"""As `accelerate launch --use_fsdp` sets them."""


def run(
    folder: Path, output: str, recipe, processes: int, *arguments: str, **variables: str
) -> subprocess.CompletedProcess:
    (folder / f"{output}.json").write_text(recipe.model_dump_json())
    program = [Path(__file__).with_name("distributed_run.py"), folder, output, *arguments]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([*torchrun, *program], env=environment, capture_output=True, text=True)


def history(output: Path) -> list[dict]:
    checkpoint = to_resume(output)
    assert checkpoint is not None
    entries = json.loads(checkpoint.state_file.read_text())["log_history"]
    return [{key: entry[key] for key in COMPARED if key in entry} for entry in entries]


def weights(output: Path) -> dict[str, torch.Tensor]:
    checkpoint = to_resume(output)
    assert checkpoint is not None
    return Fuser.from_pretrained(checkpoint.folder).state_dict()


def test_two_processes_learn_what_one_learns_from_doubled_batches(folder, recipe):
    parts = {"receiver": str(folder / "receiver"), "sharer": str(folder / "sharer")}
    optim = {"epochs": 4, "accumulate": 2, "bucket": True}
    watch = {"eval_steps": 4, "log_steps": 1, "report_to": []}
    for name, processes, size in (("one", 1, 4), ("two", 2, 2)):
        done = run(folder, name, recipe(**parts, optim=optim | {"batch_size": size}, watch=watch), processes)
        assert done.returncode == 0, done.stderr
    one, two = history(folder / "one"), history(folder / "two")
    assert [entry["step"] for entry in one] == [entry["step"] for entry in two] and len(one) == 8 + 2
    for ours, theirs in zip(one, two, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    others = weights(folder / "two")
    for name, tensor in weights(folder / "one").items():
        torch.testing.assert_close(others[name], tensor, rtol=2e-2, atol=2e-3)


def test_two_processes_go_on_after_a_kill(folder, recipe):
    """In the middle of an epoch; with noise, which each process draws for itself."""
    parts = {"receiver": str(folder / "receiver"), "sharer": str(folder / "sharer")}
    noisy = recipe(
        **parts,
        fuser={"gate": {"learned": True}},
        optim={"epochs": 3, "batch_size": 2, "sharer_dropout": 0.3},
        watch={"eval_steps": 3, "log_steps": 1, "report_to": []},
    )
    assert run(folder, "whole", noisy, 2).returncode == 0
    assert run(folder, "cut", noisy, 2, "4").returncode != 0
    checkpoint = to_resume(folder / "cut")
    assert checkpoint is not None and checkpoint.step == 3 and checkpoint.processes == 2
    done = run(folder, "cut", noisy, 2)
    assert done.returncode == 0, done.stderr
    assert history(folder / "whole") == history(folder / "cut")
    others = weights(folder / "cut")
    for name, tensor in weights(folder / "whole").items():
        assert torch.equal(tensor, others[name]), name


def test_a_fuser_in_shards_learns_the_same_also_after_a_kill(folder, recipe):
    parts = {"receiver": str(folder / "receiver"), "sharer": str(folder / "sharer")}
    watch = {"eval_steps": 3, "log_steps": 1, "keep": 1, "report_to": []}
    one, two = (recipe(**parts, optim={"epochs": 3, "batch_size": size}, watch=watch) for size in (4, 2))
    assert run(folder, "one", one, 1).returncode == 0
    assert run(folder, "two", two, 2, "7", **FSDP).returncode != 0
    checkpoint = to_resume(folder / "two")
    assert checkpoint is not None and checkpoint.step == 6
    done = run(folder, "two", two, 2, **FSDP)
    assert done.returncode == 0, done.stderr
    for ours, theirs in zip(history(folder / "one"), history(folder / "two"), strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-4)
    best = to_resume(folder / "two")
    assert best is not None and best.best_step == best.step == 12
    last, kept = weights(folder / "two"), Fuser.from_pretrained(folder / "two" / "fuser").state_dict()
    for name, tensor in weights(folder / "one").items():
        torch.testing.assert_close(last[name], tensor, rtol=2e-2, atol=2e-3)
        assert torch.equal(kept[name], last[name].bfloat16().float()), name
