"""Probes of a loaded pair."""

import pytest
import torch

from cache2cache.errors import ModelError
from cache2cache.testing import FAMILIES, TINY_SIZES, random_fuser, tiny_model
from cache2cache.verify import check_rotation, verify


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"gpt2"}))
def test_keys_can_be_rotated_back(family):
    assert "off by at most" in check_rotation(tiny_model(family))


def test_learned_positions():
    with pytest.raises(ModelError, match=r"tiny-gpt2.*learned"):
        check_rotation(tiny_model("gpt2"))


def test_learned_positions_under_a_rotary_config():
    gpt2, llama = tiny_model("gpt2"), tiny_model("llama", num_hidden_layers=2)
    size = llama.card.geometry
    gpt2.card = gpt2.card.model_copy(update={"geometry": size})
    with pytest.raises(ModelError, match="values of layer 0 depend on the position"):
        check_rotation(gpt2)


def test_interleaved_pairs():
    with pytest.raises(ModelError, match="layer 0 at position 1 is off by"):
        check_rotation(tiny_model("llama", model_type="cohere", rope_parameters=_ROPE))


def test_layers_without_rotation():
    with pytest.raises(ModelError, match="layer 3 at position 1 is off by"):
        check_rotation(tiny_model("llama", model_type="smollm3", num_hidden_layers=4, rope_parameters=_ROPE))


def test_other_frequencies_than_the_config_says():
    lm = tiny_model("qwen3")
    rope = lm.card.geometry.ropes[0]
    slower = rope.model_copy(update={"inv_freq": (*rope.inv_freq[:-1], rope.inv_freq[-1] * 2)})
    lm.card = lm.card.model_copy(update={"geometry": lm.card.geometry.model_copy(update={"ropes": (slower,)})})
    with pytest.raises(ModelError, match="layer 0 at position 7 is off by"):
        check_rotation(lm)


@pytest.mark.parametrize("kind", ["paper", "compact"])
def test_a_fuser_that_fits(kind, receiver, sharer):
    checks = verify(random_fuser(receiver, sharer, kind), receiver, sharer)
    assert all(check.passed for check in checks)
    assert [check.name for check in checks][:: len(checks) - 1] == ["fits the pair", "fuses a prompt"]
    assert "moves the cache by" in checks[-1].detail


def test_keys_that_are_taken_as_they_are_need_not_be_rotated_back(sharer):
    gpt2 = tiny_model("gpt2")
    fuser = random_fuser(gpt2, sharer, sizes={**TINY_SIZES["compact"], "still_keys": False})
    assert [(check.name, check.passed) for check in verify(fuser, gpt2, sharer)] == [
        ("fits the pair", True), ("fuses a prompt", True),
    ]  # fmt: skip


def test_other_models_of_the_same_form(receiver, sharer, fuser):
    """Their weights cannot be told from the right ones; their names can."""
    other = tiny_model("qwen3", 99, name="another-model")
    (warning,) = [check for check in verify(fuser, other, sharer) if check.warning]
    assert warning.passed
    assert warning.detail.startswith("another-model instead of tiny-receiver: ")
    assert not any(check.warning for check in verify(fuser, receiver, sharer))


def test_swapped_models(receiver, sharer, fuser):
    checks = verify(fuser, sharer, receiver)
    assert not checks[0].passed
    assert "swapped" in checks[0].detail
    assert all(check.name != "fuses a prompt" for check in checks)


def test_a_closed_fuser_does_nothing(receiver, sharer):
    *_, last = verify(random_fuser(receiver, sharer, open_gates=False), receiver, sharer)
    assert not last.passed
    assert "gates are closed" in last.detail


def test_a_fuser_that_overflows(receiver, sharer):
    fuser = random_fuser(receiver, sharer, "paper")
    torch.nn.init.constant_(fuser.leave.bias, 3e38)
    fuser.leave.weight.data *= 1e38
    *_, last = verify(fuser, receiver, sharer)
    assert not last.passed
    assert "not finite" in last.detail


_ROPE = {"rope_type": "default", "rope_theta": 10_000.0}
