"""Sizes and rotary parameters, read from configs alone."""

import pytest
import torch
from transformers import AutoConfig

from cache2cache.errors import ModelError
from cache2cache.models.geometry import geometry
from cache2cache.testing import FAMILIES, tiny_model


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_the_config_tells_what_the_cache_holds(family):
    lm = tiny_model(family)  # wrap() has compared the geometry with a real cache
    size = lm.card.geometry
    assert size.features == size.kv_heads * size.head_dim
    assert bool(size.ropes) != bool(size.rope_problem)


def test_gemma_has_two_rotary_embeddings():
    size = tiny_model("gemma3").card.geometry
    assert len(size.ropes) == 2 and set(size.rope_of_layer) == {0, 1}


def test_partial_rotary_covers_part_of_a_head():
    size = tiny_model("gpt_neox").card.geometry
    assert 2 * len(size.ropes[0].inv_freq) < size.head_dim


def test_learned_and_length_dependent_positions_are_told():
    assert "learned" in tiny_model("gpt2").card.geometry.rope_problem
    dynamic = AutoConfig.for_model(
        "llama", hidden_size=32, num_attention_heads=2, num_hidden_layers=2, vocab_size=99,
        rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0},
    )  # fmt: skip
    assert "length of the prompt" in geometry(dynamic, "dynamic").rope_problem


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3"])
def test_scaled_frequencies_are_the_models_own(kind):
    scaled = {"rope_type": kind, "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}
    scaled |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0} if kind == "llama3" else {}
    lm = tiny_model("llama", rope_parameters=scaled)
    (rope,) = lm.card.geometry.ropes
    own = lm.model.model.rotary_emb
    torch.testing.assert_close(torch.tensor(rope.inv_freq), own.inv_freq)
    assert rope.scaling == pytest.approx(own.attention_scaling)


def test_encoder_decoders_are_refused():
    with pytest.raises(ModelError, match="encoder-decoder"):
        geometry(AutoConfig.for_model("t5"), "t5")


def test_layers_of_different_sizes_are_refused():
    config = AutoConfig.for_model(
        "gemma4_text", vocab_size=260, hidden_size=32, intermediate_size=64, num_attention_heads=4, num_hidden_layers=6,
        num_key_value_heads=2, head_dim=8, hidden_size_per_layer_input=0,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"layers of gemma4 have caches of different sizes.*head_dim.*got 8, 512"):
        geometry(config, "gemma4")


@pytest.mark.parametrize("layers", [(2, 0), (1, 1, 3), ()])
def test_some_layers_keep_their_rotary_embeddings(layers):
    whole = tiny_model("gemma3").card.geometry
    some = whole.only(layers)
    assert some.layers == len(layers) and some.features == whole.features
    assert [some.ropes[i] for i in some.rope_of_layer] == [whole.ropes[whole.rope_of_layer[i]] for i in layers]


def test_some_layers_of_a_model_without_rotary_embeddings():
    some = tiny_model("gpt2").card.geometry.only([1])
    assert some.layers == 1 and some.rope_of_layer == () and "learned" in some.rope_problem
