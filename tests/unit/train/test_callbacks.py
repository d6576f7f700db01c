"""What accompanies a run: the temperature, the brake, the bar."""

import io
import json
import math
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from cache2cache import C2C
from cache2cache.errors import TrainingError
from cache2cache.fuser.gate import GateConfig
from cache2cache.testing import random_fuser
from cache2cache.train import callbacks
from cache2cache.train.callbacks import Anneal, Bar, Halt, Running
from cache2cache.train.config import ObjectivePart

ARGS = SimpleNamespace(process_index=0, world_size=1)


def state(step: int, max_steps: int = 100) -> SimpleNamespace:
    return SimpleNamespace(global_step=step, max_steps=max_steps, is_world_process_zero=True)


@pytest.mark.parametrize(("schedule", "half"), [("exponential", 0.1), ("linear", 0.505)])
def test_the_temperature_falls_with_the_steps_and_goes_on_after_a_resume(pair, schedule, half):
    gate = GateConfig(initial_temperature=1.0, final_temperature=0.01, anneal_steps=10, schedule=schedule)
    fuser = random_fuser(*pair, gate=gate)
    anneal = Anneal(fuser)
    anneal.on_step_end(ARGS, state(5), None)
    assert float(fuser.gate.temperature) == pytest.approx(half)
    anneal.on_train_begin(ARGS, state(30), None)
    assert float(fuser.gate.temperature) == pytest.approx(0.01)


@pytest.fixture
def c2c(pair):
    return C2C(pair[0], [pair[1]], [random_fuser(*pair)])


def running(c2c, loss: float) -> Running:
    tokenizer = c2c.receiver.tokenizer
    ids = torch.tensor([tokenizer("what?")["input_ids"], [0, *tokenizer("who?")["input_ids"]]])
    labels = torch.tensor([tokenizer("it")["input_ids"], [tokenizer("I")["input_ids"][0], -100]])
    places = ["a.jsonl, line 1", "a.jsonl, line 7"]
    mask = torch.tensor([[1] * 5, [0, 1, 1, 1, 1]])
    return Running([{"ids": ids, "mask": mask, "labels": labels, "places": places}], loss)


@pytest.mark.parametrize("loss", [math.nan, math.inf, 1e4])
def test_a_loss_that_is_not_finite_or_explodes_ends_the_run_with_the_batch_saved(c2c, tmp_path, loss):
    halt = Halt(c2c, ObjectivePart(), running(c2c, loss), tmp_path)
    with pytest.raises(TrainingError, match="the loss (is not finite|explodes) in step 8"):
        halt.on_pre_optimizer_step(ARGS, state(7), None, model=c2c.fusers[0])
    saved = load_file(tmp_path / "halted" / "batches-0.safetensors")
    assert torch.equal(saved["0.ids"], halt.running.batches[0]["ids"])
    rows = [json.loads(line) for line in (tmp_path / "halted" / "rows-0.jsonl").read_text().splitlines()]
    assert rows == [
        {"place": "a.jsonl, line 1", "prompt": "what?", "response": "it"},
        {"place": "a.jsonl, line 7", "prompt": "who?", "response": "I"},
    ]


def test_of_several_processes_the_loss_counts_that_all_have_together(c2c, tmp_path, monkeypatch):
    """Each has its rows' part of it, times their number, so one with long responses may have many times the whole."""
    others = [0.4]
    monkeypatch.setattr(callbacks, "reduce", lambda loss, how: {"mean": (loss + others[0]) / 2}[how])
    halt = Halt(
        c2c,
        ObjectivePart(),
        running(c2c, 1.5 * Halt(c2c, ObjectivePart(), running(c2c, 0.0), tmp_path).limit),
        tmp_path,
    )
    two = SimpleNamespace(process_index=0, world_size=2)
    halt.on_pre_optimizer_step(two, state(7), None, model=c2c.fusers[0])
    others[0] = math.nan
    with pytest.raises(TrainingError, match="is not finite in step 8"):
        halt.on_pre_optimizer_step(two, state(7), None, model=c2c.fusers[0])


def test_a_gradient_that_is_not_finite_ends_the_run(c2c, tmp_path):
    (fuser,) = c2c.fusers
    halt = Halt(c2c, ObjectivePart(), running(c2c, 1.0), tmp_path)
    fuser.enter.weight.grad = torch.zeros_like(fuser.enter.weight)
    halt.on_pre_optimizer_step(ARGS, state(0), None, model=fuser)
    assert not (tmp_path / "halted").exists()
    fuser.enter.weight.grad[0, 0, 0, 0] = math.inf
    with pytest.raises(TrainingError, match="gradients are not finite in step 1") as error:
        halt.on_pre_optimizer_step(ARGS, state(0), None, model=fuser)
    assert "got" not in str(error.value), "the loss is as it should be"


@pytest.mark.parametrize(
    ("objective", "terms", "more"),
    [({}, 1, 0), ({"distill": 0.5}, 1.5, 0), ({"response": 0, "distill": 1}, 2, 0), ({"contrastive": 2, "margin": 3}, 3, 6)],
)  # fmt: skip
def test_the_limit_is_twice_a_uniform_guess_for_each_term(c2c, tmp_path, objective, terms, more):
    halt = Halt(c2c, ObjectivePart(**objective), Running(), tmp_path)
    assert halt.limit == pytest.approx(terms * 2 * math.log(len(c2c.receiver.tokenizer)) + more)


@pytest.mark.parametrize("terminal", [False, True])
def test_the_bar_tells_loss_rate_time_and_each_validation(terminal):
    out = io.StringIO()
    seen = Running()
    bar = Bar(seen, Console(file=out, force_terminal=terminal, width=200))
    bar.on_train_begin(ARGS, state(40), None)
    seen.tokens, seen.loss = 1000, torch.tensor(3.5)
    bar.on_evaluate(ARGS, state(45), None, metrics={"eval_loss": 2.0})
    assert "loss 3.5000" in out.getvalue(), "before anything is logged, that of the step"
    bar.on_log(ARGS, state(50), None, logs={"loss": 1.25})
    bar.on_step_end(ARGS, state(50), None)
    bar.on_log(ARGS, state(50), None, logs={"eval_loss": 1.0})
    bar.on_evaluate(ARGS, state(50), None, metrics={"eval_loss": 1.0, "eval_mismatched": 2.5})
    bar.on_train_end(ARGS, state(50), None)
    bar.stop()  # twice does no harm
    said = out.getvalue()
    for part in ("step 50/100", "loss 1.2500", "tokens/s", " left", "matched 1.0000", "mismatched 2.5000"):
        assert part in said
    assert ("50/100" in said.replace("step 50/100", "")) == terminal, "the bar itself is for terminals"


def test_only_the_main_process_tells():
    out = io.StringIO()
    other = SimpleNamespace(global_step=1, max_steps=2, is_world_process_zero=False)
    bar = Bar(Running(), Console(file=out, force_terminal=True, width=200))
    bar.on_train_begin(ARGS, other, None)
    bar.on_step_end(ARGS, other, None)
    bar.on_evaluate(ARGS, other, None, metrics={"eval_loss": 1.0})
    bar.stop()
    assert not out.getvalue()
