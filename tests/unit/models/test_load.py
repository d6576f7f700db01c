"""Loading a model: what its folder says is what is loaded, and anything else is refused with its reason."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from cache2cache import C2C
from cache2cache.errors import ModelError, UnknownModelError
from cache2cache.models import load as loading
from cache2cache.models.load import LanguageModel, load
from cache2cache.models.pull import split_revision
from cache2cache.testing import FAMILIES, random_fuser, tiny_model, tiny_tokenizer

WEIGHT = "model.layers.1.mlp.down_proj.weight"


def saved(lm: LanguageModel, folder: Path) -> Path:
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny Llama."""
    return saved(tiny_model("llama"), tmp_path / "llama")


def reweigh(folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    state = load_file(folder / "model.safetensors")
    change(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def reconfigure(folder: Path, **fields: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# --- weights ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_whole_models_load_whole(family, tied, tmp_path):
    """Tied weights are stored once, which is not to miss one of them."""
    lm = tiny_model(family, tie_word_embeddings=tied)
    loaded = load(saved(lm, tmp_path / family)).model.state_dict()
    assert all(torch.equal(loaded[name], x) for name, x in lm.model.state_dict().items())


def test_weights_that_are_missing(folder):
    """transformers makes them up anew on every load."""
    reweigh(folder, lambda state: state.pop(WEIGHT))
    with pytest.raises(ModelError, match=f"{folder} are not those .*got 1 wrong: {WEIGHT} is missing") as caught:
        load(folder)
    assert "again" in str(caught.value)


def test_more_layers_than_weights(folder):
    reconfigure(folder, num_hidden_layers=5)
    with pytest.raises(ModelError, match=r"18 wrong: model.layers.3.*; …"):
        load(folder)


def test_weights_of_another_shape(folder):
    reweigh(folder, lambda state: state.update({WEIGHT: torch.ones(3, 3)}))
    with pytest.raises(ModelError, match=rf"{WEIGHT} has shape \(3, 3\) instead of \(32, 64\)"):
        load(folder)


@pytest.mark.parametrize("name", ["extra", "mtp.layers.0.weight", "model.vision_tower.layers.0.weight"])
def test_parts_that_the_model_does_not_have_do_not_matter(folder, name):
    reweigh(folder, lambda state: state.update({name: torch.ones(2)}))
    assert load(folder).card.id == "llama"


def test_fewer_layers_than_weights(folder):
    """transformers would read as many as the config says, and write noise."""
    reconfigure(folder, num_hidden_layers=2)
    with pytest.raises(ModelError, match=r"9 wrong: model.layers.2.input_layernorm.weight has no place; .*; …"):
        load(folder)


def test_what_a_class_says_is_to_be_ignored_is(tmp_path):
    """GPT-2's hub files hold its causal masks, and old Llamas' their frequencies."""
    for family, name in (
        ("gpt2", "transformer.h.0.attn.bias"),
        ("llama", "model.layers.0.self_attn.rotary_emb.inv_freq"),
    ):
        folder = saved(tiny_model(family), tmp_path / family)
        reweigh(folder, lambda state, name=name: state.update({name: torch.ones(2)}))
        assert load(folder).card.id == family


# --- damaged configs --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [{"num_attention_heads": 0}, {"num_hidden_layers": "x"}, {"num_key_value_heads": -1}, {"head_dim": -8}],
    ids=str,
)
def test_configs_of_no_model(folder, fields):
    reconfigure(folder, **fields)
    with pytest.raises(ModelError):
        load(folder)


def test_a_config_that_is_a_list(folder):
    (folder / "config.json").write_text("[]")
    with pytest.raises(ModelError, match=r"could not be loaded; got \w+: .+"):
        load(folder)


# --- revisions --------------------------------------------------------------------------------------------------


def test_only_hub_ids_have_revisions(folder, monkeypatch):
    monkeypatch.setattr(loading, "resolve", lambda name: pytest.fail(f"{name} would have been loaded"))
    for name, revision in ((folder, "v1"), (f"{folder}@v1", None), ("smollm2-135m@v1", None), ("smollm2-135m", "v1")):
        with pytest.raises(UnknownModelError, match=r"has no revisions; got revision v1; allowed: .*hub ids"):
            load(name, revision=revision)


@pytest.mark.parametrize(
    ("name", "revision", "pinned"),
    [
        ("org/name@v1", None, ("org/name", "v1")),
        ("org/name", "v1", ("org/name", "v1")),
        ("qwen3-0.6b@v1", None, ("qwen3-0.6b", "v1")),
        ("org/name", None, ("org/name", None)),
        ("smollm2-135m", None, ("smollm2-135m", None)),
    ],
)
def test_names_and_revisions(name, revision, pinned):
    """A catalogue model that the hub carries has the hub's revisions."""
    assert split_revision(name, revision) == pinned


def test_a_folder_may_have_an_at_sign_in_its_name(folder, monkeypatch):
    folder.rename(folder.parent / "tiny@home")
    monkeypatch.setenv("HOME", str(folder.parent))
    for name in (folder.parent / "tiny@home", "~/tiny@home"):
        card = load(name).card
        assert (card.id, card.revision) == ("tiny@home", None)


# --- the cache --------------------------------------------------------------------------------------------------


@pytest.fixture
def multi_query() -> LanguageModel:
    """A model whose config says 4 heads, and whose cache has 1."""
    config = AutoConfig.for_model(
        "falcon", num_hidden_layers=2, hidden_size=32, num_attention_heads=4, vocab_size=260, multi_query=True,
        new_decoder_architecture=False, initializer_range=0.25, eos_token_id=258, bos_token_id=None, pad_token_id=256,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    return LanguageModel.wrap(model, tiny_tokenizer(), name="falcon")


def test_heads_are_those_of_the_cache(multi_query):
    size = multi_query.card.geometry
    assert (size.layers, size.kv_heads, size.head_dim) == (2, 1, 8)


@pytest.mark.parametrize("kind", ["compact", "paper"])
@pytest.mark.parametrize("role", ["receiver", "sharer"])
def test_multi_query_models_fuse_in_batches_as_alone(multi_query, role, kind):
    other = tiny_model("llama", 1)
    receiver, sharer = (multi_query, other) if role == "receiver" else (other, multi_query)
    pair = C2C(receiver, [sharer], [random_fuser(receiver, sharer, kind)])
    chats = [[{"role": "user", "content": text}] for text in ("hi", "what is the capital of France?")]
    options = {"do_sample": False, "max_new_tokens": 6}
    alone = [pair.generate(chat, **options).ids for chat in chats]
    assert [answer.ids for answer in pair.generate(chats, **options)] == alone
    assert alone != [pair.generate(chat, sharers=[], **options).ids for chat in chats], "nothing was fused"
