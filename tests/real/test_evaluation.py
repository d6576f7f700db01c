"""`c2c eval` and the harness's model on the demo pair, with the questions that the package bundles."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from importlib.resources import files

import pytest
from typer.testing import CliRunner

from cache2cache.cli import app

pytestmark = pytest.mark.real

QUESTIONS = str(files("cache2cache") / "data" / "demo_questions.jsonl")


@pytest.mark.timeout(900)
def test_the_demo_pair_is_evaluated_from_the_command_line(tmp_path):
    result = CliRunner().invoke(
        app,
        ["eval", "--tasks", QUESTIONS, "--systems", "receiver,sharer,c2c,t2t:2", "--controls", "mismatched,zeroed,random",
         "--receiver-form", "chat", "--sharer-form", "quiz", "--message-tokens", "16", "--latency-rows", "1",
         "--out", str(tmp_path)],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))
    (task,) = report["tasks"].values()
    counts = {name: (system["rows"], system["errors"]) for name, system in task["systems"].items()}
    every = ("receiver", "sharer", "c2c", "mismatched", "zeroed", "random")
    assert counts == {**dict.fromkeys(every, (16, 0)), "t2t": (2, 0)}
    right = {name: task["systems"][name]["metrics"]["likelihood"]["value"] for name in every}
    # 16 questions tell a fuser that carries content from one that does not, and no more.
    assert right["c2c"] >= 0.5
    assert right["c2c"] > right["mismatched"]
    assert right["c2c"] > right["zeroed"]
    assert task["systems"]["c2c"]["format_failures"]["value"] == 0
    assert all(report["latency"][name]["p50"] > 0 for name in ("receiver", "sharer", "c2c", "t2t"))


@pytest.mark.slow
@pytest.mark.timeout(1500)
def test_a_run_that_is_killed_five_times_gives_the_report_of_one_that_is_not(tmp_path):
    """SIGKILL while it writes its rows, at five random counts of them (seed 0)."""

    def start(out):
        arguments = [
            "eval", "--tasks", QUESTIONS, "--systems", "receiver,sharer,t2t:4,c2c", "--controls", "mismatched,random",
            "--receiver-form", "chat", "--sharer-form", "quiz", "--message-tokens", "8", "--batch-size", "2",
            "--latency-rows", "0", "--out", str(out),
        ]  # fmt: skip
        program = "from cache2cache.cli import main; main()"
        # With several threads the last bits of a sum may differ from one run to the next.
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen([sys.executable, "-c", program, *arguments], env=env, stderr=subprocess.PIPE, text=True)

    def finish(process):
        _, errors = process.communicate()
        assert process.returncode == 0, errors

    finish(start(tmp_path / "whole"))
    every = (tmp_path / "whole" / "rows.jsonl").read_bytes().count(b"\n")
    rows = tmp_path / "killed" / "rows.jsonl"
    for wanted in sorted(random.Random(0).sample(range(1, every), 5)):
        process = start(rows.parent)
        while process.poll() is None and (not rows.exists() or rows.read_bytes().count(b"\n") < wanted):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    finish(start(rows.parent))
    reports = []
    for out in (tmp_path / "whole", rows.parent):
        report = json.loads((out / "report.json").read_text(encoding="utf-8"))
        for name in ("seconds", "started", "peak_memory_bytes", "commands"):
            report["run"].pop(name)
        reports.append(report)
    assert reports[0] == reports[1]


@pytest.mark.slow
def test_with_closed_gates_the_harness_gives_the_numbers_of_its_own_model(tmp_path):
    """Row by row, on SmolLM2 in float32; 16 questions, plain text and chat template."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    from cache2cache import C2C
    from cache2cache.evaluate.lm_eval import C2CLM
    from cache2cache.models.load import load
    from cache2cache.testing import random_fuser

    task = {
        "task": "bundled", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": QUESTIONS}},
        "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "Question: {{question}}\nAnswer:",
        "doc_to_choice": "{{choices}}", "doc_to_target": "answer",
    }  # fmt: skip
    receiver, sharer = load("smollm2-135m", dtype="float32"), load("gemma3-270m", dtype="float32")
    closed = C2C(receiver, [sharer], [random_fuser(receiver, sharer, open_gates=False)])
    for chat in (False, True):
        found = []
        for model in (HFLM(receiver.model, tokenizer=receiver.tokenizer, device="cpu", batch_size=4), C2CLM(closed, 4)):
            out = lm_eval.simple_evaluate(
                model, tasks=[dict(task)], apply_chat_template=chat, bootstrap_iters=0, device="cpu",
                task_manager=TaskManager(include_defaults=False),
            )  # fmt: skip
            found.append([row["filtered_resps"] for row in out["samples"]["bundled"]])
        for theirs, ours in zip(*found, strict=True):
            for (nats, greedy), (expected, was_greedy) in zip(ours, theirs, strict=True):
                assert nats == pytest.approx(expected, abs=2e-3)
                assert greedy == was_greedy
