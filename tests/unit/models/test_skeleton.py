"""Models without weights: sizes and tokens are those of the whole model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cache2cache.errors import DownloadError, ModelError, UnknownModelError
from cache2cache.models import kv
from cache2cache.models.catalogue import MODELS
from cache2cache.models.load import LanguageModel, load
from cache2cache.models.skeleton import head_weight, layer_weights, shallow, skeleton, stand_in_tokenizer
from cache2cache.testing import FAMILIES, tiny_model
from cache2cache.text.chat import render

CPU = torch.device("cpu")


def saved(lm: LanguageModel, folder: Path, *, weights: bool = True) -> str:
    """A folder that transformers can load."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    if not weights:
        (folder / "model.safetensors").unlink()
    return str(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_skeleton_is_the_model_without_its_weights(family, tmp_path):
    whole = load(saved(tiny_model(family), tmp_path / "whole"))
    found = skeleton(saved(tiny_model(family), tmp_path / "whole", weights=False))
    assert found.lm.card == whole.card
    assert found.lm.dtype == whole.dtype and found.lm.device.type == "meta" and found.to_fetch is None
    assert found.weights == sum(p.nbytes for p in whole.model.parameters())
    text = "Which planet is closest to the sun?"
    assert found.lm.tokenizer(text)["input_ids"] == whole.tokenizer(text)["input_ids"]


@pytest.mark.parametrize(
    "fields", [{"num_attention_heads": 0}, {"num_hidden_layers": "x"}, {"head_dim": -8}, []], ids=str
)
def test_configs_of_no_model(fields, tmp_path):
    folder = saved(tiny_model("llama"), tmp_path, weights=False)
    config = tmp_path / "config.json"
    config.write_text(json.dumps(fields and {**json.loads(config.read_text()), **fields}))
    with pytest.raises(ModelError):
        skeleton(folder)


def test_tied_weights_count_once(tmp_path):
    sizes = [
        skeleton(saved(tiny_model("llama", tie_word_embeddings=tied), tmp_path / str(tied), weights=False)).weights
        for tied in (False, True)
    ]
    vocabulary = len(tiny_model("llama").tokenizer)  # type: ignore[arg-type]
    assert sizes[0] - sizes[1] == 4 * 32 * vocabulary


@pytest.mark.parametrize(("dtype", "size"), [("auto", 4), ("float32", 4), ("bfloat16", 2), ("float16", 2)])
def test_dtype(dtype, size, tmp_path):
    found = skeleton(saved(tiny_model("qwen3"), tmp_path, weights=False), dtype=dtype)
    assert found.weights == size * sum(p.numel() for p in tiny_model("qwen3").model.parameters())


@pytest.mark.parametrize(
    ("name", "weights", "layers", "kv_heads", "head_dim"),
    [
        ("smollm2-135m", 269_030_016, 30, 3, 64),
        ("qwen2.5-coder-0.5b", 1_260_334_848, 24, 2, 64),
        ("qwen2.5-coder-1.5b", 3_554_176_000, 28, 2, 128),
        ("gemma3-270m", 536_196_352, 18, 1, 256),
    ],
)
def test_registry_models_need_not_be_fetched(name, weights, layers, kv_heads, head_dim):
    """The numbers are those of the converted models."""
    found = skeleton(name)
    size = found.lm.card.geometry
    assert (found.weights, size.layers, size.kv_heads, size.head_dim) == (weights, layers, kv_heads, head_dim)
    assert found.to_fetch is MODELS[name] and found.lm.card.id == name


def test_every_registry_model_has_its_config():
    assert all(model.config for model in MODELS.values() if model.weights is not None)


@pytest.mark.parametrize("content", ["Hello there, 12 == 12!", "naïve café 缓存", "a\n\n b\t c", ""])
def test_the_stand_in_tokenizer_covers_a_text(content):
    tokenizer = stand_in_tokenizer()
    rendering = render(tokenizer, [{"role": "user", "content": content}])
    assert content in rendering.text
    covered = {i for start, end in zip(rendering.starts, rendering.ends, strict=True) for i in range(start, end)}
    assert {i for i, x in enumerate(rendering.text) if not x.isspace()} <= covered


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("vocabulary", [True, False])
def test_a_shallow_copy_reads_like_the_model(family, vocabulary, tmp_path):
    whole = tiny_model(family)
    lm = skeleton(saved(whole, tmp_path, weights=False)).lm
    size = whole.card.geometry
    copy = shallow(lm, 1, CPU, vocabulary=vocabulary)
    cache = kv.prefill(copy.model, torch.zeros((2, 20), dtype=torch.long), torch.ones((2, 20), dtype=torch.long))
    kv.check(cache, 1, size.kv_heads, size.head_dim, 20, family)
    assert kv.stack(cache).isfinite().all()
    assert copy.card.geometry.layers == 1 and copy.card.geometry.vocab_size == (size.vocab_size if vocabulary else 8)
    assert lm.card.geometry.layers == size.layers, "the skeleton itself was cut"


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_of_the_layers_and_of_the_head(family):
    lm = tiny_model(family)
    everything = sum(p.numel() for p in lm.model.parameters())
    vocabulary = 2 * head_weight(lm).numel()
    assert sum(p.numel() for p in layer_weights(lm)) == everything - vocabulary


def test_unknown_names_and_damaged_configs(tmp_path):
    with pytest.raises(UnknownModelError, match="smollm2-135m"):
        skeleton("smollm2-135")
    with pytest.raises(UnknownModelError, match="smollm2-135m has no revisions; got revision v1"):
        skeleton("smollm2-135m@v1")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "no-such-model"}))
    with pytest.raises(ModelError, match="could not be read"):
        skeleton(str(tmp_path))
    with pytest.raises(ModelError, match="unknown dtype"):
        skeleton("smollm2-135m", dtype="float8")


def test_a_hub_that_does_not_answer(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # otherwise it is asked again and again
    with pytest.raises(DownloadError, match=r"org/none could not be read(?s:.*)network"):
        skeleton("org/none")
    with pytest.raises(DownloadError, match=r"org/none could not be loaded(?s:.*)network"):
        load("org/none")


def test_a_model_that_cannot_take_part(tmp_path):
    folder = saved(tiny_model("llama"), tmp_path, weights=False)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "rwkv", "vocab_size": config["vocab_size"]}))
    with pytest.raises(ModelError, match="no per-token KV cache"):
        skeleton(folder)
