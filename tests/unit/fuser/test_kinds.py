"""What every kind of fuser must keep, and what is special about compact."""

import pytest
import torch

from cache2cache.errors import FuserFormatError, FuserMismatchError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.layer_map import last_aligned
from cache2cache.fuser.rotary import Rotary
from cache2cache.fuser.several import Speaker, fused_kv
from cache2cache.testing import random_fuser, tiny_model

KINDS = ["paper", "compact"]


def fuse(fuser: Fuser, own, other, at, their_at, heard: torch.Tensor | None = None) -> torch.Tensor:
    heard = torch.ones_like(at, dtype=torch.bool) if heard is None else heard
    return fused_kv(own, at, [Speaker(fuser, other, their_at, heard)])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtype_out_is_dtype_in(kind, dtype, receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer, kind)
    own, other, *at = caches(fuser)
    out = fuse(fuser, own.to(dtype), other.to(dtype), *at)
    assert out.dtype == dtype
    assert out.isfinite().all()
    assert not torch.equal(out, own.to(dtype))


@pytest.mark.parametrize("kind", KINDS)
def test_closed_gates_change_no_bit(kind, receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer, kind, open_gates=False)
    own, other, *at = caches(fuser)
    assert torch.equal(fuse(fuser, own.bfloat16(), other, *at), own.bfloat16())
    assert not fuser.speaks()
    assert fuser.delta(own, other, *at).value.shape[0] == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("opened", [[0], [3], [1, 2], [0, 2, 3]])
def test_open_gates_give_what_all_of_them_give(kind, opened, receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer, kind)
    own, other, *at = caches(fuser)
    whole = fuse(fuser, own, other, *at).flatten(0, 1)
    fuser.gate.logit.data.fill_(-1.0).view(-1)[opened] = 1.0
    part = fuse(fuser, own, other, *at).flatten(0, 1)
    for entry in range(len(part)):
        if entry in opened:
            torch.testing.assert_close(part[entry], whole[entry])
        else:
            assert torch.equal(part[entry], own.flatten(0, 1)[entry])


@pytest.mark.parametrize("kind", KINDS)
def test_unheard_positions_change_no_bit(kind, receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer, kind)
    own, other, *at = caches(fuser)
    heard = torch.tensor([[True, False, True, False, True], [False] * 5])
    out = fuse(fuser, own, other, *at, heard)
    at_silent = ~heard[None, None, :, None, :, None].expand(own.shape)
    assert torch.equal(out[at_silent], own[at_silent])
    assert not torch.equal(out, own)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_and_positions_are_independent(kind, receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer, kind)
    own, other, at, their_at = caches(fuser)
    whole = fuse(fuser, own, other, at, their_at)
    part = fuse(fuser, own[:, :, 1:, :, 2:4], other[:, :, 1:, :, 2:4], at[1:, 2:4], their_at[1:, 2:4])
    torch.testing.assert_close(part, whole[:, :, 1:, :, 2:4])


@pytest.mark.parametrize("kind", KINDS)
def test_training_reaches_every_parameter(kind, receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer, kind).train()
    fuse(fuser, *caches(fuser)).square().sum().backward()
    still = [name for name, p in fuser.named_parameters() if p.grad is None or not p.grad.any()]
    assert not still


@pytest.mark.parametrize("kind", KINDS)
def test_unknown_size_is_refused(kind, receiver, sharer):
    config = random_fuser(receiver, sharer, kind).config
    with pytest.raises(FuserFormatError, match="depth"):
        Fuser.from_config(config.model_copy(update={"sizes": {"depth": 3}}))


# --- compact ------------------------------------------------------------------------------------------------------


@pytest.fixture
def fresh(receiver, sharer) -> Fuser:
    """Untrained, with open gates."""
    config = random_fuser(receiver, sharer).config
    return Fuser.from_config(config).eval()


def test_a_fresh_compact_fuser_changes_nothing(fresh, caches):
    own, other, *at = caches(fresh)
    torch.testing.assert_close(fuse(fresh, own, other, *at), own, rtol=0, atol=0)


def test_compact_does_not_depend_on_absolute_positions(receiver, sharer, caches):
    """The same still keys at other positions on both sides: the delta is the same, rotated to the new positions."""
    fuser = random_fuser(receiver, sharer)
    own, other, at, their_at = caches(fuser)
    rotate_own, rotate_other = (
        Rotary(receiver.card.geometry),
        Rotary(sharer.card.geometry, list(fuser.config.layer_map)),
    )
    layers = torch.arange(receiver.card.geometry.layers)
    stills = []
    for shift, their_shift in ((0, 0), (17, 400)):
        moved, theirs = own.clone(), other.clone()
        moved[0] = rotate_own(own[0], at + shift, layers, back=False)
        theirs[0] = rotate_other(other[0], their_at + their_shift, layers, back=False)
        value = fuser.delta(moved, theirs, at + shift, their_at + their_shift).value.view(own.shape)
        keys = rotate_own(value[0], at + shift, layers, back=True)
        stills.append(torch.stack([keys, value[1]]))
    torch.testing.assert_close(stills[0], stills[1], rtol=1e-3, atol=1e-4)


def test_paper_depends_on_absolute_positions(receiver, sharer, caches):
    """The published arithmetic takes keys as they are, so positions are read from them, not from the arguments."""
    fuser = random_fuser(receiver, sharer, "paper")
    own, other, at, their_at = caches(fuser)
    assert torch.equal(fuser.delta(own, other, at, their_at).value, fuser.delta(own, other, at + 9, their_at + 9).value)


def test_statistics_are_those_of_the_sample(fresh, caches):
    own, other, at, their_at = caches(fresh, rows=4, positions=50)
    own, other = own * 3 + 1, other * 0.5 - 2
    fresh.standardise(own, other, at * 0, their_at * 0)
    torch.testing.assert_close(fresh.own_mean.mean(), torch.tensor(1.0), rtol=0.05, atol=0)
    torch.testing.assert_close(fresh.other_mean.mean(), torch.tensor(-2.0), rtol=0.05, atol=0)
    torch.testing.assert_close(fresh.own_std.mean(), torch.tensor(3.0), rtol=0.05, atol=0)


def test_compact_says_when_it_cannot_rotate(sharer):
    gpt2 = tiny_model("gpt2")
    size = gpt2.card.geometry
    config = FuserConfig(
        kind="compact",
        receiver=gpt2.card,
        sharer=sharer.card,
        layer_map=last_aligned(size.layers, sharer.card.geometry.layers),
    )
    with pytest.raises(FuserMismatchError, match=r'tiny-gpt2.*rotary.*kind "paper"'):
        Fuser.from_config(config)
