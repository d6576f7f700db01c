import pytest
import torch

from cache2cache.fuser.several import Speaker, fused_kv
from cache2cache.testing import random_fuser


@pytest.fixture
def two(receiver, sharer, caches):
    """The receiver's cache, its positions, and two speakers."""
    fusers = [random_fuser(receiver, sharer, seed=seed) for seed in (0, 1)]
    own, other, at, their_at = caches(fusers[0])
    everywhere = torch.ones_like(at, dtype=torch.bool)
    return (
        own,
        at,
        [Speaker(fuser, kv, their_at, everywhere) for fuser, kv in zip(fusers, (other, other.flip(0)), strict=True)],
    )


def test_nobody_speaks(two):
    own, at, _ = two
    assert torch.equal(fused_kv(own, at, []), own)


def test_parallel_is_the_sum_of_deltas_from_the_clean_cache(two):
    own, at, speakers = two
    alone = [fused_kv(own, at, [speaker]) - own for speaker in speakers]
    torch.testing.assert_close(fused_kv(own, at, speakers), own + alone[0] + alone[1])


def test_parallel_does_not_depend_on_order_and_sequential_does(two):
    own, at, speakers = two
    back = speakers[::-1]
    torch.testing.assert_close(fused_kv(own, at, speakers), fused_kv(own, at, back))
    assert not torch.allclose(fused_kv(own, at, speakers, "sequential"), fused_kv(own, at, back, "sequential"))


def test_sequential_is_one_after_another(two):
    own, at, speakers = two
    after_first = fused_kv(own, at, speakers[:1])
    torch.testing.assert_close(fused_kv(own, at, speakers, "sequential"), fused_kv(after_first, at, speakers[1:]))


@pytest.mark.parametrize("mode", ["parallel", "sequential"])
def test_one_speaker_is_the_same_in_both_modes(two, mode):
    own, at, speakers = two
    assert torch.equal(fused_kv(own, at, speakers[:1], mode), fused_kv(own, at, speakers[:1]))
