import pytest
import torch
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from cache2cache.fuser.rotary import Rotary
from cache2cache.types import Geometry, Rope

FAST, SLOW = Rope(inv_freq=(1.0, 0.1, 0.01, 0.001)), Rope(inv_freq=(0.5, 0.01, 0.002, 1e-4), scaling=1.3)
HALF = Rope(inv_freq=(1.0, 0.01))


def geometry(ropes: tuple[Rope, ...], of_layer: tuple[int, ...]) -> Geometry:
    return Geometry(
        layers=len(of_layer),
        kv_heads=2,
        head_dim=8,
        vocab_size=None,
        max_positions=None,
        ropes=ropes,
        rope_of_layer=of_layer,
    )


@pytest.fixture
def keys() -> torch.Tensor:
    """(L = 3, B, H, P, D)"""
    return torch.randn(3, 2, 2, 5, 8, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def positions() -> torch.Tensor:
    return torch.tensor([[0, 1, 2, 3, 4], [0, 0, 700, 701, 702]])


KINDS = [geometry((FAST,), (0, 0, 0)), geometry((FAST, SLOW), (0, 1, 0)), geometry((HALF,), (0, 0, 0))]


@pytest.mark.parametrize("size", KINDS, ids=["one kind", "two kinds", "partial"])
def test_round_trip(size, keys, positions):
    rotary, entries = Rotary(size), torch.arange(3)
    there = rotary(keys, positions, entries, back=False)
    assert not torch.allclose(there, keys)
    torch.testing.assert_close(rotary(there, positions, entries, back=True), keys, rtol=1e-4, atol=1e-5)


def test_is_transformers_rotation(keys, positions):
    angle = (positions[..., None].float() * torch.tensor(FAST.inv_freq)).repeat(1, 1, 2)
    want, _ = apply_rotary_pos_emb(keys[0], keys[0], angle.cos(), angle.sin())
    got = Rotary(KINDS[0])(keys, positions, torch.arange(3), back=False)[0]
    torch.testing.assert_close(got, want)


def test_each_layer_has_its_own_kind(keys, positions):
    got = Rotary(KINDS[1])(keys, positions, torch.arange(3), back=False)
    for layer, rope in enumerate((FAST, SLOW, FAST)):
        alone = Rotary(geometry((rope,), (0,)))(keys[layer : layer + 1], positions, torch.arange(1), back=False)
        torch.testing.assert_close(got[layer], alone[0])


def test_partial_rotation_leaves_the_rest(keys, positions):
    got = Rotary(KINDS[2])(keys, positions, torch.arange(3), back=False)
    assert torch.equal(got[..., 4:], keys[..., 4:])


def test_entries_choose_layers(keys, positions):
    """Through a layer map, entries 0 and 1 are the sharer's layers 1 and 0."""
    rotary = Rotary(KINDS[1], layers=[1, 0])
    got = rotary(keys[:1], positions, torch.tensor([1]), back=False)
    want = Rotary(geometry((FAST,), (0,)))(keys[:1], positions, torch.arange(1), back=False)
    torch.testing.assert_close(got, want)
