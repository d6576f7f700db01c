"""Plain attention for short readings: the numbers of the usual one, with gradients, and the usual one afterwards."""

import pytest
import torch

from cache2cache.models import kv
from cache2cache.models.attention import few_queries
from cache2cache.testing import tiny_model


def read(lm, held: torch.Tensor, ids: torch.Tensor, mask: torch.Tensor, queries: int):
    held = held.clone().requires_grad_()
    cache = kv.from_tensors(list(zip(*held, strict=True)))
    with few_queries(lm.model, queries):
        name = lm.model.config._attn_implementation
        kv.extend(lm.model, ids, mask, cache)
    assert lm.model.config._attn_implementation == "sdpa"
    loss = kv.columns(cache, held.shape[4])[:, :, mask[:, -1].bool()].square().sum()
    loss.backward()
    return name, loss.detach(), held.grad


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma3", "phi3", "gpt_neox", "gpt2", "mistral"])
def test_the_numbers_are_those_of_the_usual_attention(family):
    """Grouped heads, windows, padding on the left, more than one layer."""
    lm = tiny_model(family)
    size = lm.card.geometry
    torch.manual_seed(0)
    held = torch.randn(2, size.layers, 2, size.kv_heads, 30, size.head_dim)
    ids = torch.arange(8).view(2, 4)
    mask = torch.ones(2, 34, dtype=torch.long)
    mask[1, :5] = 0
    usual, quick = read(lm, held, ids, mask, 33), read(lm, held, ids, mask, 4)
    assert usual[0] == "sdpa" != quick[0]
    for one, other in zip(usual[1:], quick[1:], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_another_attention_that_was_asked_for_stays():
    lm = tiny_model("llama")
    lm.model.set_attn_implementation("eager")
    with few_queries(lm.model, 1):
        assert lm.model.config._attn_implementation == "eager"


def test_the_usual_attention_comes_back_after_an_error():
    lm = tiny_model("llama")
    with pytest.raises(ZeroDivisionError), few_queries(lm.model, 1):
        raise ZeroDivisionError
    assert lm.model.config._attn_implementation == "sdpa"
