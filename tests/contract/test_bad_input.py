"""Whatever is wrong, the user reads one clear error: what, got, allowed, what to do."""

import copy
import pickle

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from cache2cache import C2C, C2CError, errors
from cache2cache.errors import (
    AlignmentError,
    ContextLengthError,
    ConversationError,
    FuserMismatchError,
    ModelError,
    TemplateError,
)
from cache2cache.models.load import LanguageModel, load
from cache2cache.testing import random_fuser, tiny_model, tiny_pair, tiny_tokenizer
from cache2cache.types import Span

USER = {"role": "user", "content": "hi"}


@pytest.fixture(scope="module")
def models():
    return tiny_pair()


@pytest.fixture(scope="module")
def c2c(models):
    receiver, sharer = models
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer)])


@pytest.mark.parametrize(
    ("conversation", "words"),
    [
        ([], "empty"),
        ([[]], "empty"),
        ([{"role": "wizard", "content": "hi"}], "wizard"),
        ([{"role": "user"}], "role and content"),
        ([{"role": "user", "content": None}], "not text"),
        ("hi", "list of messages"),
    ],
)
def test_conversations_that_are_none(c2c, conversation, words):
    with pytest.raises(ConversationError, match=words):
        c2c.generate(conversation, max_new_tokens=2)


def test_a_template_that_refuses(models):
    refusing = tiny_tokenizer(template="{{ raise_exception('system messages are not supported') }}")
    with pytest.raises(TemplateError, match="system messages are not supported"):
        C2C(tiny_model("llama", tokenizer=refusing)).generate([USER], max_new_tokens=2)


@pytest.mark.parametrize(("words", "new"), [(600, 2), (10, 600)])
def test_prompts_longer_than_the_context(c2c, words, new):
    with pytest.raises(ContextLengthError, match="512 together"):
        c2c.generate([{"role": "user", "content": "x" * words}], max_new_tokens=new)


def test_ids_longer_than_the_context(c2c):
    with pytest.raises(ContextLengthError, match="512 together"):
        c2c.prefill(receiver_ids=torch.zeros((1, 600), dtype=torch.long))


def test_an_answer_of_no_stated_length_ends_with_the_context(models):
    short = C2C(tiny_model("llama", max_position_embeddings=60, eos_token_id=None))
    answer = short.generate([{"role": "user", "content": "hi"}], do_sample=False)
    assert answer.counts.receiver_prompt + answer.counts.generated <= 60


def test_a_fuser_of_another_pair(models):
    receiver, sharer = models
    other = tiny_model("qwen2", num_hidden_layers=5)
    with pytest.raises(FuserMismatchError, match="layers"):
        C2C(receiver, [sharer], [random_fuser(receiver, other)])


def test_a_fuser_of_the_same_sizes_but_another_tokenizer(models):
    receiver, sharer = models
    fuser = random_fuser(receiver, sharer)
    other = LanguageModel(
        sharer.model, sharer.tokenizer, sharer.card.model_copy(update={"tokenizer": "0123456789abcdef"})
    )
    with pytest.raises(FuserMismatchError, match="another tokenizer"):
        C2C(receiver, [other], [fuser])


def test_swapped_receiver_and_sharer(models):
    receiver, sharer = models
    with pytest.raises(FuserMismatchError, match="swapped"):
        C2C(sharer, [receiver], [random_fuser(receiver, sharer)])


def test_numbers_of_sharers_and_fusers_differ(models):
    with pytest.raises(FuserMismatchError, match="one fuser per sharer"):
        C2C(models[0], [models[1]], [])


@pytest.mark.parametrize("who", [[1], [[0], [0]], [-1]])
def test_sharers_that_do_not_exist(c2c, who):
    with pytest.raises(FuserMismatchError, match="indices"):
        c2c.generate([USER], sharers=who, max_new_tokens=2)


TINY = {"num_hidden_layers": 2, "hidden_size": 32, "vocab_size": 300}


@pytest.mark.parametrize(
    "config",
    [
        {"model_type": "mamba", "state_size": 4, **TINY},
        {
            "model_type": "deepseek_v3", "num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8,
            "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 6, "intermediate_size": 32,
            "first_k_dense_replace": 2, **TINY,
        },
    ],
    ids=lambda config: config["model_type"],
)  # fmt: skip
def test_models_without_a_per_token_cache(config):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config))
    with pytest.raises(ModelError, match="no per-token KV cache|cannot read a prompt"):
        LanguageModel.wrap(model, tiny_tokenizer(), name="odd")


def test_weights_that_are_not_finite():
    lm = tiny_model("llama")
    broken = copy.deepcopy(lm.model)
    broken.model.layers[0].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ModelError, match="not finite"):
        LanguageModel.wrap(broken, lm.tokenizer, name="broken")


def test_truncated_weights(tmp_path):
    lm = tiny_model("llama")
    lm.model.save_pretrained(tmp_path)
    lm.tokenizer.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    with pytest.raises(ModelError, match="damaged"):
        load(tmp_path)


def test_learned_positions_cannot_be_unrotated():
    with pytest.raises(FuserMismatchError, match=r"learned.*paper"):
        random_fuser(tiny_model("gpt2"), tiny_model("llama"), "compact")


IDS = torch.arange(8)[None]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"sharer_ids": torch.arange(5)[None]}, "no alignment was given"),
        ({"alignments": [torch.full((1, 8), 8)]}, "leaves the sharer's columns"),
        ({"receiver_mask": torch.ones(1, 7)}, "wrong shape"),
        ({"spans": [Span(0, 8)]}, "last token"),
        ({"spans": [Span(3, 5), Span(4, 6)]}, "overlap"),
        ({"sharer_ids": [IDS, IDS]}, "one tensor of sharer ids per sharer"),
    ],
)
def test_ids_that_do_not_belong_together(c2c, arguments, words):
    with pytest.raises(AlignmentError, match=words):
        c2c.prefill(receiver_ids=IDS, **arguments)


STANDARD = (ValueError, LookupError, OSError, ImportError, RuntimeError)


def test_every_error_is_a_c2c_error_and_a_standard_one_and_survives_pickling():
    kinds = [e for e in vars(errors).values() if isinstance(e, type) and issubclass(e, C2CError) and e is not C2CError]
    assert len(kinds) > 10
    for kind in kinds:
        assert any(issubclass(kind, standard) for standard in STANDARD), kind
        error = kind("it broke", got=3, allowed="1, 2", hint="Try 1")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is kind
        assert str(again) == str(error) == "it broke; got 3; allowed: 1, 2. Try 1"
