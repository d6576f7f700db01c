"""Layer maps and temperature schedules, exactly as recorded."""

from __future__ import annotations

import json

import pytest
import torch

from cache2cache.fuser.gate import Gate, GateConfig
from cache2cache.fuser.layer_map import depth_normalised, last_aligned


def test_layer_maps(data):
    """For every recorded pair of depths; of several sources the published code uses the first."""
    tables = json.loads((data / "tables/layer_mapping.json").read_text())["tables"]
    assert len(tables) > 10
    for depths, maps in tables.items():
        receiver, sharer = (int(part[1:]) for part in depths.split("_"))
        for name, ours in (("last_aligned", last_aligned), ("k_nearest", depth_normalised)):
            for k in (1, 2, 3):
                recorded = maps[f"{name}.k{k}"]
                want = tuple(recorded[str(layer)][0] for layer in range(receiver))
                assert ours(receiver, sharer) == want, (depths, name, k)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_temperatures(data, dtype):
    for schedule in json.loads((data / "tables/gate_temperature.json").read_text())["schedules"]:
        config = GateConfig(
            initial_temperature=schedule["initial"],
            final_temperature=schedule["final"],
            anneal_steps=schedule["anneal_steps"],
        )
        gate = Gate(config, layers=1).to(getattr(torch, dtype))
        for step, want in zip(schedule["steps"], schedule[f"torch.{dtype}"], strict=True):
            gate.anneal(step)
            assert gate.temperature.item() == want, step
