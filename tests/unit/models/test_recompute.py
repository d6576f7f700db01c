"""Gradient checkpointing behind a cache: the same numbers from fewer kept activations."""

import pytest
import torch

from cache2cache.errors import ModelError
from cache2cache.models import kv
from cache2cache.models.recompute import recomputed
from cache2cache.testing import tiny_model


def read(model, held: torch.Tensor, ids: torch.Tensor, *, again: bool):
    """Loss, gradient of the held cache, the cache afterwards, and bytes kept for the backward pass."""
    held = held.clone().requires_grad_()
    cache = kv.from_tensors(list(zip(*held, strict=True)))
    mask = torch.ones((len(ids), held.shape[4] + ids.shape[1]), dtype=torch.long)
    kept: dict[int, int] = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        if again:
            with recomputed(model):
                kv.extend(model, ids, mask, cache)
        else:
            kv.extend(model, ids, mask, cache)
        loss = kv.stack(cache).square().sum()
    loss.backward()
    return loss.detach(), held.grad, kv.stack(cache).detach(), sum(kept.values())


def held_by(lm, rows: int, length: int) -> torch.Tensor:
    size = lm.card.geometry
    shape = (2, size.layers, rows, size.kv_heads, length, size.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "phi3", "gpt_neox", "gpt2", "mistral"])
def test_loss_gradients_and_cache_are_the_same_and_less_is_kept(family):
    lm = tiny_model(family)
    ids = torch.arange(40).view(2, 20)
    plain = read(lm.model, held_by(lm, 2, 5), ids, again=False)
    again = read(lm.model, held_by(lm, 2, 5), ids, again=True)
    for one, other in zip(plain[:3], again[:3], strict=True):
        assert torch.equal(one, other)
    assert again[2].shape[4] == 25
    assert again[3] < 0.7 * plain[3]


def test_a_cache_that_is_empty_is_filled(receiver):
    ids = torch.arange(8).view(2, 4)
    with recomputed(receiver.model):
        cache = kv.new_cache()
        kv.extend(receiver.model, ids, torch.ones_like(ids), cache)
    expected = kv.prefill(receiver.model, ids, torch.ones_like(ids))
    assert torch.equal(kv.stack(cache), kv.stack(expected))


def test_the_model_is_as_before_afterwards_even_if_reading_fails():
    lm = tiny_model("llama")
    before = [dict(vars(module)) for module in lm.model.modules()]
    with pytest.raises(ZeroDivisionError), recomputed(lm.model):
        raise ZeroDivisionError
    assert [dict(vars(module)) for module in lm.model.modules()] == before


def test_a_forward_that_somebody_else_put_there_runs_and_stays():
    lm = tiny_model("llama")
    layer, calls = lm.model.model.layers[0], []
    original = layer.forward
    layer.forward = hooked = lambda *args, **kwargs: calls.append(1) or original(*args, **kwargs)
    ids = torch.arange(4)[None]
    with recomputed(lm.model):
        kv.extend(lm.model, ids, torch.ones_like(ids), kv.new_cache())
    assert calls and layer.forward is hooked


def test_a_model_without_such_layers_is_refused():
    with pytest.raises(ModelError, match="no layers that can be computed again"), recomputed(torch.nn.Linear(1, 1)):
        pass
