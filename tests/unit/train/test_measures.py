"""What a run says of itself: likelihoods over all rows, and what the fuser's weights look like."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from cache2cache.fuser.gate import GateConfig
from cache2cache.testing import random_fuser
from cache2cache.train.measures import measures, watched

ROWS = np.array(
    # nats, tokens, mismatched, zeroed, first
    [[1.0, 1, 3.0, 2.0, 1], [9.0, 3, 9.0, 6.0, 0], [2.0, 2, np.nan, 4.0, 1]]
)


def test_rows_weigh_as_much_as_they_have_tokens():
    found = measures(SimpleNamespace(predictions=ROWS))
    expected = {"loss": 12 / 6, "zeroed": 12 / 6, "accuracy": 2 / 3, "mismatched": 12 / 4, "margin": 2 / 4}
    assert found == pytest.approx(expected)


def test_without_another_row_nothing_is_said_of_mismatched_caches():
    assert set(measures(SimpleNamespace(predictions=ROWS[2:]))) == {"loss", "zeroed", "accuracy"}


def test_gate_openness_is_what_sampling_finds(pair):
    fuser = random_fuser(*pair, gate=GateConfig(initial_temperature=1e-3))
    with torch.no_grad():
        fuser.gate.logit.copy_(torch.linspace(-2, 2, fuser.gate.logit.numel()).view_as(fuser.gate.logit))
    noise = torch.rand((fuser.gate.logit.numel(), 20_000, 1, 1, 1), generator=torch.Generator().manual_seed(0))
    shares = fuser.gate.sample(noise).detach().mean((1, 2, 3, 4)).view_as(fuser.gate.logit)
    found = watched(fuser.state_dict(), fuser)
    for kind, name in enumerate(("keys", "values")):
        for layer in range(fuser.gate.logit.shape[1]):
            assert found[f"gate/{name}_{layer:02d}"] == pytest.approx(float(shares[kind, layer]), abs=0.01)
    assert found["gate/temperature"] == pytest.approx(1e-3)


def test_norms_are_those_of_weight_and_bias_together(pair):
    fuser = random_fuser(*pair)
    both = torch.cat([fuser.enter.weight.flatten(), fuser.enter.bias.flatten()])
    found = watched(fuser.state_dict(), fuser)
    assert found["norm/enter"] == pytest.approx(float(both.norm().detach()), rel=1e-5)
    assert not any("mean" in name or "logit" in name for name in found)


def test_gates_that_are_not_learned_are_not_watched(pair):
    fuser = random_fuser(*pair, gate=GateConfig(learned=False, initial_logit=1.0))
    assert not any(name.startswith("gate/") for name in watched(fuser.state_dict(), fuser))
