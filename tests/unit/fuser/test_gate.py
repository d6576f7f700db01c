import math

import pytest
import torch
from pydantic import ValidationError

from cache2cache.fuser.gate import Gate, GateConfig


def test_zero_is_closed_in_use():
    gate = Gate(GateConfig(), layers=2)
    gate.logit.data = torch.tensor([[0.0, 1e-6], [-1.0, 3.0]])
    assert gate.open().tolist() == [1, 3]


def test_temperature_falls_and_stays():
    config = GateConfig(initial_temperature=2.0, final_temperature=0.02, anneal_steps=10)
    assert config.temperature(0) == 2.0
    assert config.temperature(5) == pytest.approx(0.2)
    assert config.temperature(10) == config.temperature(99) == pytest.approx(0.02)


def test_temperature_falls_on_a_line():
    config = GateConfig(initial_temperature=2.0, final_temperature=0.02, anneal_steps=10, schedule="linear")
    assert [config.temperature(step) for step in (0, 5, 10, 99)] == pytest.approx([2.0, 1.01, 0.02, 0.02])


def test_zero_is_mostly_open_in_training():
    """One Gumbel draw is not zero-mean: P(open) = P(−log(−log u) > 0) = 1 − 1/e."""
    gate = Gate(GateConfig(initial_temperature=1e-3), layers=1)
    noise = torch.rand(2, 1, 1, 20_000, 1, generator=torch.Generator().manual_seed(0))
    assert gate.sample(noise).mean().item() == pytest.approx(1 - 1 / math.e, abs=0.01)


@pytest.mark.parametrize("noise", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_draws_are_finite(noise, dtype):
    gate = Gate(GateConfig(), layers=1).to(dtype)
    assert gate.sample(torch.full((2, 1, 1, 1, 1), noise, dtype=dtype)).isfinite().all()


def test_gate_that_is_not_learned_has_no_gradient():
    assert not Gate(GateConfig(learned=False, initial_logit=2.0), layers=1).logit.requires_grad


@pytest.mark.parametrize(
    ("chosen", "opened"),
    [
        ({}, [0, 1, 2, 3, 4, 5]),
        ({"kinds": ("keys",)}, [0, 1, 2]),
        ({"kinds": ("values",)}, [3, 4, 5]),
        ({"kinds": ("values", "keys")}, [0, 1, 2, 3, 4, 5]),
        ({"layers": (2, 0)}, [0, 2, 3, 5]),
        ({"kinds": ("values",), "layers": (1,)}, [4]),
    ],
)
def test_chosen_entries_are_open(chosen, opened):
    assert Gate(GateConfig(learned=False, initial_logit=1.0, **chosen), layers=3).open().tolist() == opened


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"kinds": ("keys",)}, "learned = false"),
        ({"layers": (0,)}, "learned = false"),
        ({"kinds": ("keys",), "learned": False}, "initial_logit above 0"),
        ({"kinds": (), "learned": False, "initial_logit": 1.0}, "kinds"),
        ({"layers": (), "learned": False, "initial_logit": 1.0}, "layers"),
        ({"kinds": ("heads",), "learned": False, "initial_logit": 1.0}, "kinds"),
        ({"schedule": "cosine"}, "schedule"),
        ({"anneal_steps": 0}, "anneal_steps"),
        ({"initial_temperature": 0.0}, "initial_temperature"),
        ({"final_temperature": -1.0}, "final_temperature"),
    ],
)
def test_wrong_fields_are_refused(fields, words):
    with pytest.raises(ValidationError, match=words):
        GateConfig(**fields)
