import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from cache2cache.fuser.base import KINDS
from cache2cache.models import kv
from cache2cache.testing import FAMILIES, WORDS, random_fuser, tiny_model, tiny_pair, tiny_tokenizer


@pytest.mark.parametrize("text", ["", "plain", "naïve café — 缓存 🚀\n\t", "<|im_start|>user", "the question == 12"])
@pytest.mark.parametrize("merge", [(), WORDS])
def test_tokenizer_spells_any_text(text: str, merge: tuple[str, ...]):
    tokenizer = tiny_tokenizer(merge=merge)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_merges_words_and_puts_bos():
    tokenizer = tiny_tokenizer(merge=WORDS, bos=True)
    assert tokenizer.tokenize("the question and answer") == ["the", "Ġquestion", "Ġand", "Ġanswer"]
    assert tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id
    assert tokenizer("a", add_special_tokens=False)["input_ids"] != tokenizer("a")["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_the_same_on_every_call_and_read_what_they_are_given(family: str):
    first, again, other = tiny_model(family), tiny_model(family), tiny_model(family, seed=1)
    ids = torch.tensor([list(b"the first byte matters to the last")])
    changed = ids.clone()
    changed[0, -16] += 1  # inside the windows, which are 16 wide

    def logits(lm, ids):
        return lm.model(input_ids=ids).logits[0, -1]

    assert torch.equal(logits(first, ids), logits(again, ids))
    assert not torch.equal(logits(first, ids), logits(other, ids))
    assert (logits(first, ids) - logits(first, changed)).abs().max() > 1e-2


def test_random_numbers_of_the_caller_are_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    random_fuser(*tiny_pair())
    assert torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("open_gates", [True, False])
def test_random_fuser_changes_the_cache_if_its_gates_are_open(kind: str, open_gates: bool):
    receiver, sharer = tiny_pair()
    fuser = random_fuser(receiver, sharer, kind, open_gates=open_gates)
    fuser.check_pair(receiver.card, sharer.card)
    ids = torch.arange(1, 6)[None]
    positions, mask = torch.arange(5)[None], torch.ones_like(ids)
    own = kv.stack(kv.prefill(receiver.model, ids, mask))
    other = kv.gather(kv.prefill(sharer.model, ids, mask), positions, fuser.config.layer_map)
    entries, value = fuser.delta(own, other, positions, positions)
    assert len(entries) == (4 if open_gates else 0)
    assert not open_gates or value.abs().mean() > 1e-2


def test_tiny_models_can_be_saved_and_loaded(tmp_path, receiver):
    receiver.model.save_pretrained(tmp_path)
    receiver.tokenizer.save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("naïve 🚀<|im_end|>")["input_ids"] == receiver.tokenizer("naïve 🚀<|im_end|>")["input_ids"]
    assert tokenizer.chat_template == receiver.tokenizer.chat_template
    ids = torch.tensor([[5, 6, 7]])
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded(input_ids=ids).logits, receiver.model(input_ids=ids).logits)


def test_unknown_family_names_the_known():
    with pytest.raises(ValueError, match="gemma3"):
        tiny_model("gemma4")
