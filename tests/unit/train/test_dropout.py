"""Training without the sharer: rows that hear its mean features do not hear it, and the others are left alone."""

import pytest
import torch
from pydantic import ValidationError

from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.testing import tiny_model
from cache2cache.train.config import OptimPart
from cache2cache.train.dropout import SharerDropout

ROWS, WIDTH = 6, 7


@pytest.fixture(scope="module")
def statistics():
    size = tiny_model("gemma3").card.geometry
    cache = torch.randn(2, size.layers, size.kv_heads, 9, size.head_dim, generator=torch.Generator().manual_seed(0))
    return FeatureStatistics.of(size, [cache], [torch.arange(9)])


@pytest.fixture
def theirs(statistics):
    size = statistics.geometry
    return torch.randn(2, size.layers, ROWS, size.kv_heads, WIDTH, size.head_dim)


@pytest.fixture
def positions():
    """Other ones in each row."""
    return torch.arange(WIDTH) + 3 * torch.arange(ROWS)[:, None]


def expected(statistics: FeatureStatistics, positions: torch.Tensor, row: int) -> torch.Tensor:
    return statistics.mean_cache(positions[row])


@pytest.mark.parametrize("training", [True, False])
def test_at_1_every_row_is_the_mean_at_its_own_positions(statistics, theirs, positions, training):
    got = SharerDropout(1.0, statistics)(theirs, positions, training=training)
    assert got.shape == theirs.shape
    for row in range(ROWS):
        torch.testing.assert_close(got[:, :, row], expected(statistics, positions, row))


def test_below_1_some_rows_are_the_mean_and_the_others_untouched(statistics, theirs, positions):
    torch.manual_seed(0)
    dropout, dropped = SharerDropout(0.3, statistics), []
    for _ in range(100):
        got = dropout(theirs, positions, training=True)
        for row in range(ROWS):
            dropped.append(not torch.equal(got[:, :, row], theirs[:, :, row]))
            if dropped[-1]:
                torch.testing.assert_close(got[:, :, row], expected(statistics, positions, row))
    assert 0.2 < sum(dropped) / len(dropped) < 0.4


def test_below_1_validation_hears_the_sharer(statistics, theirs, positions):
    state = torch.get_rng_state()
    assert SharerDropout(0.99, statistics)(theirs, positions, training=False) is theirs
    assert torch.equal(torch.get_rng_state(), state)


def test_the_global_seed_chooses_the_rows(statistics, theirs, positions):
    draws = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        draws.append(torch.cat([SharerDropout(0.5, statistics)(theirs, positions, training=True) for _ in range(5)]))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_the_mean_is_not_rounded_to_the_caches_dtype(statistics, theirs, positions):
    got = SharerDropout(1.0, statistics)(theirs.bfloat16(), positions, training=True)
    torch.testing.assert_close(got[:, :, 0], expected(statistics, positions, 0))
    torch.manual_seed(0)
    some = SharerDropout(0.5, statistics)(theirs.bfloat16(), positions, training=True)
    kept = [row for row in range(ROWS) if not torch.allclose(some[:, :, row], expected(statistics, positions, row))]
    assert 0 < len(kept) < ROWS
    assert torch.equal(some[:, :, kept], theirs.bfloat16().float()[:, :, kept])


@pytest.mark.parametrize("rate", [-0.1, 1.1, float("nan")])
def test_rates_outside_0_to_1_are_refused(rate):
    with pytest.raises(ValidationError, match="sharer_dropout"):
        OptimPart(sharer_dropout=rate)
