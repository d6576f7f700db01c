"""What is said of fields that are wrong."""

import math
from copy import deepcopy
from typing import Any

import pytest

from cache2cache.train.faults import faults

RIGHT: dict[str, Any] = {
    "receiver": "r",
    "sharer": "s",
    "data": {"train": [{"path": "a"}], "validation": [{"path": "b"}]},
}


def with_(key: str, value: object) -> dict[str, Any]:
    document = deepcopy(RIGHT)
    *tables, last = key.split(".")
    at: Any = document
    for table in tables:
        at = at[int(table)] if isinstance(at, list) else at.setdefault(table, {})
    at[last] = value
    return document


def test_nothing_is_said_of_a_right_one():
    assert faults(RIGHT) == []


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("epochs", 3, "recipe: unknown epochs (did you mean optim.epochs?), known are receiver, sharer, "),
        ("optim.seed", 3, "optim: unknown seed (did you mean seed?), known are learning_rate, "),
        ("optim.eval_steps", 3, "optim: unknown eval_steps (did you mean watch.eval_steps?), known"),
        ("optim.epoch", 3, "optim: unknown epoch (did you mean optim.epochs?), known"),
        ("fuser.learned", True, "fuser: unknown learned (did you mean fuser.gate.learned?), known"),
        ("fuser.gate.initial_logits", 1, "fuser.gate: unknown initial_logits (did you mean fuser.gate.initial_logit?)"),
        (
            "data.train.0.limt",
            3,
            "data.train.0: unknown limt (did you mean data.train.0.limit?), known are path, hub, ",
        ),
        ("fuser.sizes.widht", 3, "fuser.sizes: unknown widht (did you mean fuser.sizes.width?), known are width, "),
        ("watch.qqq", 3, "watch: unknown qqq, known are eval_steps, "),
        ("fuser.kind", "small", "fuser.kind: Input should be 'compact' or 'paper' (got 'small')"),
        ("fuser.kind", [], "fuser.kind: Input should be 'compact' or 'paper' (got [])"),
        ("fuser.layer_map", [0, "x"], "fuser.layer_map.1: Input should be a valid integer"),
        ("fuser.sizes.width", 0, "fuser.sizes.width: Input should be greater than 0 (got 0)"),
        ("fuser.sizes", 0, "fuser.sizes: Input should be a valid dictionary (got 0)"),
        ("fuser", 0, "fuser: Input should be a valid dictionary"),
        ("data.train", [], "data.train: Tuple should have at least 1 item"),
        ("data.train.0.limit", -1, "data.train.0.limit: Input should be greater than 0 (got -1)"),
        ("data.train.0.neighbours", 4, "data.train.0: neighbours needs a limit"),
        ("data.train.0.task", "arc-easy", "data.train.0: a source has exactly one of path, hub, task"),
        ("data.train.0.split", "validation", "data.train.0: only hub data sets have a subset, a split or a revision"),
        ("seed", -1, "seed: Input should be greater than or equal to 0 (got -1)"),
        ("data.seed", 2**32, "data.seed: Input should be less than 4294967296"),
        ("fuser.gate.learned", False, "fuser: gates that are not learned stay as they begin, and these begin closed"),
        ("fuser.gate.final_temperature", math.inf, "fuser.gate.final_temperature: Input should be a finite number"),
        (
            "data.train",
            [{"path": "a", "weight": 1}, {"path": "b"}],
            "data: all sources have a weight or none; without one: b",
        ),
        ("optim.learning_rate", math.inf, "optim.learning_rate: Input should be a finite number"),
        ("objective.response", 0, "objective: response and distill are both 0: nothing to learn from"),
        ("data.stream", True, "recipe: data.stream needs optim.max_steps"),
        ("receiver", "x" * 100, None),
        ("receiver", list(range(100)), "…)"),
    ],
)
def test_each_fault_is_said_once(key: str, value: object, said: str | None):
    found = faults(with_(key, value))
    assert len([fault for fault in found if said and said in fault]) == (said is not None)
    if "layer_map" not in key:  # where two kinds of value are allowed, both are described
        assert len(found) == (said is not None)


def test_two_unknown_names_of_a_table_are_one_fault():
    document = with_("optim.epoch", 1)
    document["optim"]["batchsize"] = 1
    (fault,) = faults(document)
    assert "unknown epoch (did you mean optim.epochs?), batchsize (did you mean optim.batch_size?), known" in fault


def test_all_faults_are_told():
    document = {"epochs": 3, "fuser": {"sizes": {"width": 0}}, "data": {"train": [], "validation": [{}]}}
    said = "\n".join(faults(document))
    for words in ("receiver: Field required", "sharer: ", "unknown epochs", "data.train: ", "data.validation.0: ",
                  "fuser.sizes.width: "):  # fmt: skip
        assert words in said
