"""What every kind of fuser must keep, and what is special about compact."""

from itertools import product

import pytest
import torch

from cache2cache.errors import FuserFormatError, FuserMismatchError
from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.gate import GateConfig
from cache2cache.fuser.layer_map import last_aligned
from cache2cache.fuser.rotary import Rotary
from cache2cache.fuser.several import Speaker, fused_kv
from cache2cache.testing import TINY_SIZES, random_fuser, tiny_model

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
@pytest.mark.parametrize("chosen", [{"kinds": ("values",)}, {"layers": (1,)}])
def test_entries_that_may_not_open_are_neither_fused_nor_trained(kind, chosen, receiver, sharer, caches):
    gate = GateConfig(learned=False, initial_logit=1.0, **chosen)
    fuser = random_fuser(receiver, sharer, kind, gate=gate).train()
    own, other, *at = caches(fuser)
    out = fuse(fuser, own, other, *at)
    out.square().sum().backward()
    opened = set(fuser.gate.open().tolist())
    assert len(opened) == 2 and len(own.flatten(0, 1)) == 4
    for entry in range(4):
        assert torch.equal(out.flatten(0, 1)[entry], own.flatten(0, 1)[entry]) == (entry not in opened)
        assert bool(fuser.enter.weight.grad.flatten(0, 1)[entry].any()) == (entry in opened)


def test_a_layer_that_the_receiver_does_not_have_is_refused(receiver, sharer):
    with pytest.raises(ValueError, match=r"gate.layers \[2\] leaves the receiver's layers 0–1"):
        random_fuser(receiver, sharer, gate=GateConfig(learned=False, initial_logit=1.0, layers=(2,)))


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


# --- parts of compact that an ablation leaves out -----------------------------------------------------------------

PROJECT = {"combine": "replace", "hear_own": False, "weigh": False}
"""The paper's "Project"."""


def with_parts(receiver, sharer, **parts) -> Fuser:
    return random_fuser(receiver, sharer, sizes={**TINY_SIZES["compact"], **parts})


PARTS = [
    {"still_keys": False},
    {"weigh": False},
    {"combine": "replace"},
    {"hear_own": False},
    PROJECT,
    PROJECT | {"still_keys": False},
]


@pytest.mark.parametrize("parts", PARTS)
def test_a_fuser_without_a_part_is_trained_whole_and_comes_back(parts, receiver, sharer, caches, tmp_path):
    fuser = with_parts(receiver, sharer, **parts)
    own, other, *at = caches(fuser)
    whole = fuse(fuser, own, other, *at)
    assert not torch.equal(whole, fuse(with_parts(receiver, sharer), own, other, *at))
    assert torch.equal(fuse(Fuser.from_pretrained(fuser.save_pretrained(tmp_path)), own, other, *at), whole)
    fuse(fuser.train(), own, other, *at).square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for name, p in fuser.named_parameters() if name != "gate.logit")


@pytest.mark.parametrize("parts", [{}, *PARTS])
def test_compact_computes_what_it_says(parts, receiver, sharer, caches):
    """Its docstring, one entry, row, head and position at a time."""
    fuser = with_parts(receiver, sharer, **parts)
    own, other, at, their_at = caches(fuser)
    fused, sizes = fuse(fuser, own, other, at, their_at), fuser.sizes
    state = fuser.state_dict()
    rotate_own, rotate_other = (
        Rotary(receiver.card.geometry),
        Rotary(sharer.card.geometry, list(fuser.config.layer_map)),
    )

    def turned(rotary, kv, positions, layer, kind, *, back):
        if kind == 1 or not sizes.still_keys:
            return kv
        return rotary(kv[None, None, :, None], positions.view(1, 1), torch.tensor([layer]), back=back)[0, 0, :, 0]

    for kind, layer, row, p in product((0, 1), range(own.shape[1]), range(own.shape[2]), range(own.shape[4])):

        def w(name, kind=kind, layer=layer):
            return state[name][kind, layer]

        t, s = own[kind, layer, row, :, p], other[kind, layer, row, :, p]
        standard = [(turned(rotate_other, s, their_at[row, p], layer, kind, back=True).flatten(), "other")]
        if sizes.hear_own:
            standard.append((turned(rotate_own, t, at[row, p], layer, kind, back=True).flatten(), "own"))
        x = torch.cat([(still - w(f"{side}_mean")[0]) / w(f"{side}_std")[0] for still, side in standard])
        h = x @ w("enter.weight") + w("enter.bias")[0]
        normed = h / (h.square().mean() + 1e-6).sqrt() * w("blocks.0.norm")[0]
        h = h + torch.nn.functional.gelu(normed @ w("blocks.0.w1.weight")) @ w("blocks.0.w2.weight")
        weight = (h @ w("weigh.weight") + w("weigh.bias")[0]).sigmoid()[:, None] if sizes.weigh else 1.0
        shift = w("own_std")[0] * (h @ w("leave.weight") + w("leave.bias")[0])
        if sizes.combine == "replace":
            shift = shift + w("own_mean")[0]
        projection = turned(rotate_own, shift.view_as(t), at[row, p], layer, kind, back=False)
        change = projection - t if sizes.combine == "replace" else projection
        torch.testing.assert_close(fused[kind, layer, row, :, p], t + weight * change, rtol=1e-4, atol=1e-5)


def test_keys_as_they_are_depend_on_absolute_positions(receiver, sharer, caches):
    fuser = with_parts(receiver, sharer, still_keys=False)
    own, other, at, their_at = caches(fuser)
    assert torch.equal(fuser.delta(own, other, at, their_at).value, fuser.delta(own, other, at + 9, their_at + 9).value)


def test_keys_as_they_are_need_no_rotary_parameters(sharer):
    gpt2 = tiny_model("gpt2")
    assert with_parts(gpt2, sharer, still_keys=False).speaks()


def test_only_the_sharer_is_heard(receiver, sharer, caches):
    fuser = with_parts(receiver, sharer, hear_own=False)
    own, other, *at = caches(fuser)
    assert torch.equal(fuser.delta(own, other, *at).value, fuser.delta(own + 1, other, *at).value)
    assert not torch.equal(fuser.delta(own, other, *at).value, fuser.delta(own, other + 1, *at).value)


def test_unweighted_heads_are_of_weight_one(receiver, sharer, caches):
    fuser, unweighted = with_parts(receiver, sharer), with_parts(receiver, sharer, weigh=False)
    unweighted.load_state_dict({name: x for name, x in fuser.state_dict().items() if not name.startswith("weigh.")})
    fuser.weigh.weight.data.zero_()
    fuser.weigh.bias.data.zero_()
    args = caches(fuser)
    torch.testing.assert_close(fuser.delta(*args).value * 2, unweighted.delta(*args).value)


def test_projection_alone_forgets_the_receivers_cache(receiver, sharer, caches):
    fuser = with_parts(receiver, sharer, **PROJECT)
    own, other, *at = caches(fuser)
    torch.testing.assert_close(fuse(fuser, own, other, *at), fuse(fuser, own * 2 - 1, other, *at))


def test_a_fresh_projection_alone_is_the_receivers_mean(receiver, sharer, caches):
    fuser = Fuser.from_config(with_parts(receiver, sharer, **PROJECT).config).eval()
    own, other, at, their_at = caches(fuser, rows=3, positions=20)
    fuser.standardise(own, other, at, their_at)
    fused = fuse(fuser, own, other, at, their_at)
    layers = torch.arange(receiver.card.geometry.layers)
    still = [Rotary(receiver.card.geometry)(x[0], at, layers, back=True) for x in (own, fused)]
    for clean, new in ((still[0], still[1]), (own[1], fused[1])):
        mean = clean.mean((1, 3), keepdim=True).expand_as(clean)
        torch.testing.assert_close(new, mean, rtol=1e-4, atol=1e-5)


def test_in_place_standardising_leaves_the_caches_alone(receiver, sharer, caches):
    """Later spans are fused from caches with gradients, and a step is made from caches that the next epoch reads again."""
    fuser = random_fuser(receiver, sharer).train()
    own, other, *at = caches(fuser)
    kept, theirs = own.clone(), other.clone()
    fuse(fuser, own.requires_grad_(), other.requires_grad_(), *at).square().sum().backward()
    assert torch.equal(own, kept) and torch.equal(other, theirs)
    assert own.grad.any() and other.grad.any()


def test_gradients_of_the_caches_are_those_of_finite_differences(receiver, sharer, caches):
    fuser = random_fuser(receiver, sharer).double()
    own, other, *at = caches(fuser, rows=1, positions=2)
    change = torch.Generator().manual_seed(1)
    for x in (own := own.double().requires_grad_(), other := other.double().requires_grad_()):
        direction = torch.randn(x.shape, generator=change, dtype=torch.float64)
        (slope,) = torch.autograd.grad(fuser.delta(own, other, *at).value.square().sum(), x)
        step = 1e-3 * direction
        ends = [
            fuser.delta(*(y + sign * step if y is x else y for y in (own, other)), *at).value.square().sum()
            for sign in (1, -1)
        ]
        assert ((ends[0] - ends[1]) / 2).item() == pytest.approx((slope * step).sum().item(), rel=1e-3)


def test_parts_do_not_change_the_statistics(receiver, sharer, caches):
    """What a fuser does with its inputs does not change what they are."""
    plain, other_parts = (Fuser.from_config(with_parts(receiver, sharer, **p).config) for p in ({}, PROJECT))
    for fuser in (plain, other_parts):
        fuser.standardise(*caches(fuser))
    for name, x in plain.named_buffers():
        assert torch.equal(x, other_parts.get_buffer(name)), name
