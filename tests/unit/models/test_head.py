"""Logits at chosen positions are those that the whole model computes there."""

import pytest
import torch

from cache2cache.errors import ModelError
from cache2cache.models import kv
from cache2cache.models.head import logits_at
from cache2cache.testing import FAMILIES, tiny_model, tiny_tokenizer


@pytest.mark.parametrize(
    ("family", "config"), [*((family, {}) for family in FAMILIES), ("gemma3", {"final_logit_softcapping": 0.5})]
)
def test_logits_are_the_models_own(family, config):
    """Whatever the model does to them behind its head: a cap of 0.5 changes every one."""
    lm = tiny_model(family, **config)
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    wanted = torch.tensor([[0, 1, 0, 0, 1, 1], [1, 0, 0, 0, 0, 1]]).bool()
    cache = kv.prefill(lm.model, ids[:, :3], mask[:, :3])
    got = logits_at(lm.model, ids[:, 3:], mask, cache, wanted[:, 3:])
    expected = lm.model(ids, attention_mask=mask).logits[:, 3:][wanted[:, 3:]]
    assert got.shape == (3, lm.card.geometry.vocab_size)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert kv.length(cache) == 6
    after = lm.model(ids, attention_mask=mask).logits
    assert after.shape[:2] == (2, 6), "the model is as before"


def test_a_model_without_a_head_is_refused():
    lm = tiny_model("llama", tokenizer=tiny_tokenizer())
    ids = torch.zeros((1, 1), dtype=torch.long)
    with pytest.raises(ModelError, match="no output head"):
        logits_at(lm.model.get_decoder(), ids, torch.ones_like(ids), kv.new_cache(), ids == 0)
