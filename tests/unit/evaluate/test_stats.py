"""Intervals and tests against scipy, against published worked examples, and against what they promise."""

import itertools
import math
import warnings

import numpy as np
import pytest
from scipy import stats as scipy_stats

from cache2cache.errors import DataError
from cache2cache.evaluate import stats

SHARE = (0.0, 1.0)


@pytest.fixture(autouse=True)
def _no_numerical_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


def outcomes(right, wrong):
    return np.repeat([1.0, 0.0], [right, wrong])


def discordant(only_a, only_b, both=0, neither=0):
    """Two systems' outcomes with that many rows of each kind."""
    return outcomes(only_a + both, only_b + neither), np.repeat([0, 1, 1, 0], [only_a, both, only_b, neither]).astype(
        float
    )


def numbers(estimate):
    return estimate.value, estimate.low, estimate.high


# Wilson


@pytest.mark.parametrize(
    ("right", "rows", "low", "high"),
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_gives_the_published_intervals(right, rows, low, high):
    # Newcombe 1998, Statistics in Medicine 17, 857–872, table I, method 3.
    found = stats.wilson(outcomes(right, rows - right))
    assert numbers(found) == pytest.approx((right / rows, low, high), abs=5e-5)
    assert found.n == rows


@pytest.mark.parametrize("rows", [1, 2, 7, 500])
def test_wilson_of_all_right_mirrors_all_wrong(rows):
    all_right, all_wrong = stats.wilson(np.ones(rows)), stats.wilson(np.zeros(rows))
    assert all_right.value == all_right.high == 1.0
    assert all_wrong.value == all_wrong.low == 0.0
    assert 0 < all_right.low < 1
    assert all_wrong.high == pytest.approx(1 - all_right.low)


# McNemar


@pytest.mark.parametrize(
    ("only_a", "only_b", "p"),
    [
        (
            12,
            2,
            0.0129,
        ),  # Armitage and Berry 1994, p. 127: two media for tuberculosis, exact two-sided P by StatsDirect
        (1, 7, 9 / 128),  # Bentur et al. 2009 in Fagerland et al. 2013: 2 · binomcdf(1, 8, 0.5)
        (5, 5, 1.0),
        (0, 0, 1.0),
        (0, 1, 1.0),
        (6, 0, 2 / 2**6),
    ],
)
def test_mcnemar_gives_the_exact_p(only_a, only_b, p):
    a, b = discordant(only_a, only_b, both=20, neither=16)
    assert stats.mcnemar(a, b) == (pytest.approx(p, abs=5e-5), only_a, only_b)
    assert stats.mcnemar(b, a) == (pytest.approx(p, abs=5e-5), only_b, only_a)


def test_mcnemar_ignores_rows_on_which_both_agree():
    assert stats.mcnemar(*discordant(9, 3)) == stats.mcnemar(*discordant(9, 3, both=400, neither=70))


# bootstrap of means


def expanded_level(rows):
    """The level at which a plain percentile interval is the expanded one."""
    return 1 - 2 * scipy_stats.norm.cdf(scipy_stats.t.ppf(0.025, rows - 1) * math.sqrt(rows / (rows - 1)))


@pytest.mark.parametrize("rows", [40, 300])
def test_mean_is_scipys_bootstrap_at_the_expanded_level(rows):
    values = np.random.default_rng(1).gamma(2.0, size=rows)
    expected = scipy_stats.bootstrap(
        (values,), np.mean, n_resamples=9_999, method="percentile", confidence_level=expanded_level(rows), batch=500,
        rng=np.random.default_rng(7),
    )  # fmt: skip
    found, interval = stats.mean(values), expected.confidence_interval
    assert found.value == pytest.approx(values.mean())
    # Another seed: the limits differ by what 9,999 resamples leave to chance.
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.1 * expected.standard_error)
    assert found.n == rows


@pytest.mark.parametrize("counts", [(30, 12, 158), (4, 1, 45), (90, 60, 350)])
def test_paired_outcomes_are_scipys_bootstrap_of_the_differences(counts):
    a, b = discordant(*counts)
    expected = scipy_stats.bootstrap(
        (a, b), lambda x, y, axis: x.mean(axis) - y.mean(axis), paired=True, vectorized=True, n_resamples=9_999, batch=500,
        method="percentile", confidence_level=expanded_level(len(a)), rng=np.random.default_rng(3),
    )  # fmt: skip
    found, interval = stats.paired(a, b, SHARE), expected.confidence_interval
    assert found.value == pytest.approx((counts[0] - counts[1]) / len(a))
    # A limit is a multiple of one row, and may fall on the next one with another seed.
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=1.01 / len(a))


def test_few_and_many_distinct_values_are_resampled_alike():
    values = np.repeat(np.arange(15.0), 20)
    split = values + np.linspace(0, 1e-9, len(values))  # so many distinct values that rows themselves are drawn
    assert numbers(stats.mean(values)) == pytest.approx(numbers(stats.mean(split)), abs=0.1 * values.std() / 300**0.5)


def test_the_other_way_round_is_the_same_difference():
    rng = np.random.default_rng(5)
    a, b = rng.random(200), rng.random(200)
    value, low, high = numbers(stats.paired(a, b))
    assert numbers(stats.paired(b, a)) == pytest.approx((-value, -high, -low), abs=0.005)


def test_pairing_makes_the_interval_narrower_than_that_of_either_side():
    rng = np.random.default_rng(6)
    difficulty = rng.normal(size=300)
    a, b = difficulty + 0.1 * rng.normal(size=300), difficulty + 0.1 * rng.normal(size=300)
    difference, alone = stats.paired(a, b), stats.mean(a)
    assert difference.high - difference.low < 0.3 * (alone.high - alone.low)


@pytest.mark.parametrize("rows", [6, 12])
def test_intervals_cover_the_true_difference_as_often_as_they_say(rows):
    rng, covered, runs = np.random.default_rng(11), 0, 200
    for _ in range(runs):
        a = rng.normal(0.3, 1.0, size=rows)
        found = stats.paired(a, a - rng.normal(0.2, 0.5, size=rows))
        covered += found.low <= 0.2 <= found.high
    # Two-sided binomial limits of 95 % in 200 runs, at one in a thousand.
    low, high = scipy_stats.binom.interval(0.999, runs, 0.95)
    assert low <= covered <= high


def test_intervals_of_paired_outcomes_cover_the_true_difference():
    rng, covered, runs = np.random.default_rng(12), 0, 200
    for _ in range(runs):
        kind = rng.choice(4, p=[0.2, 0.1, 0.4, 0.3], size=200)  # only a, only b, both, neither
        found = stats.paired(np.isin(kind, [0, 2]), np.isin(kind, [1, 2]), SHARE)
        covered += found.low <= 0.1 <= found.high
    low, high = scipy_stats.binom.interval(0.999, runs, 0.95)
    assert low <= covered <= high


# rows of which resampling says too little


@pytest.mark.parametrize(("value", "rows"), [*itertools.product([0.0, 0.4, 1.0], [1, 2, 4, 5, 40])])
def test_rows_that_are_all_the_same_leave_room_for_others_within_the_limits(value, rows):
    found = stats.mean(np.full(rows, value), SHARE)
    unseen = stats.wilson(np.zeros(rows)).high
    expected = (value, value * (1 - unseen), value + unseen * (1 - value))
    assert numbers(found) == pytest.approx(expected)


@pytest.mark.parametrize("rows", [1, 3, 30, 1000])
def test_systems_that_never_differ_are_not_claimed_to_be_equal(rows):
    same = outcomes(rows, 0)
    found = stats.paired(same, same, SHARE)
    assert found.value == 0.0
    assert found.low == pytest.approx(-found.high)
    assert 0.7 / rows < found.high < 4 / rows


def test_room_for_other_rows_shrinks_as_rows_are_added():
    lows = [stats.mean(np.ones(rows), SHARE).low for rows in (1, 2, 3, 5, 10, 100)]
    assert lows == sorted(lows)
    assert lows[-1] > 0.95


@pytest.mark.parametrize("values", [[0.0, 1.0], [0.2, 0.4, 0.9], [1.0, 1.0, 0.0, 1.0]])
def test_fewer_than_five_shares_have_an_interval_beyond_their_range(values):
    found = stats.mean(values, SHARE)
    assert 0 <= found.low <= min(values) <= found.value <= max(values) <= found.high <= 1


def test_fewer_than_five_numbers_without_limits_have_students_interval():
    values = [1.0, 1.4, 2.5]
    expected = scipy_stats.ttest_1samp(values, 0).confidence_interval(0.95)
    assert numbers(stats.mean(values)) == pytest.approx((np.mean(values), expected.low, expected.high))


def test_one_number_without_limits_settles_nothing():
    # Wall, Boen and Tweedie 2001: x ± 9.68 |x|.
    assert numbers(stats.paired([3.0], [1.0])) == pytest.approx((2.0, -17.36, 21.36))


def test_one_number_covers_the_mean_of_any_normal_distribution():
    rng = np.random.default_rng(8)
    for spread in (0.05, 0.3, 1.0, 4.0):
        drawn = rng.normal(1.0, spread, size=2_000)
        covered = np.mean([abs(x - 1) <= 9.68 * abs(x) for x in drawn])
        assert covered > 0.94
        low, high = numbers(stats.mean(drawn[:1]))[1:]
        assert (low + high) / 2 == pytest.approx(drawn[0])


# gap recovered


def test_gap_recovered_is_the_ratio_of_the_differences():
    rng = np.random.default_rng(2)
    receiver, sharer, system = (np.array(rng.random(600) < p, dtype=float) for p in (0.3, 0.7, 0.5))
    found = stats.gap_recovered(system, receiver, sharer, SHARE)
    assert found is not None
    ratio = (system.mean() - receiver.mean()) / (sharer.mean() - receiver.mean())
    assert found.value == pytest.approx(ratio)
    assert found.low < ratio < found.high
    expected = scipy_stats.bootstrap(
        (system, receiver, sharer),
        lambda s, r, h, axis: (s.mean(axis) - r.mean(axis)) / (h.mean(axis) - r.mean(axis)),
        paired=True, vectorized=True, n_resamples=9_999, batch=500, method="percentile", rng=np.random.default_rng(9),
    )  # fmt: skip
    interval = expected.confidence_interval
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high), abs=0.1 * expected.standard_error)


def test_gap_recovered_does_not_care_which_direction_is_better():
    rng = np.random.default_rng(4)
    receiver = rng.normal(3.0, 0.5, size=80)
    sharer, system = receiver - 1 + 0.1 * rng.normal(size=80), receiver - 0.4 + 0.1 * rng.normal(size=80)
    nats, minus = stats.gap_recovered(system, receiver, sharer), stats.gap_recovered(-system, -receiver, -sharer)
    assert nats is not None and minus is not None
    assert nats.value == pytest.approx(0.4, abs=0.05)
    assert minus.value == pytest.approx(nats.value)


def test_gap_recovered_at_and_beyond_its_ends():
    receiver, sharer, worse, better = (outcomes(right, 100 - right) for right in (40, 80, 20, 100))
    found = [stats.gap_recovered(system, receiver, sharer, SHARE) for system in (worse, receiver, sharer, better)]
    below, none, whole, above = (numbers(estimate) for estimate in found if estimate is not None)
    assert none == (0.0, 0.0, 0.0) and whole == (1.0, 1.0, 1.0)
    assert (below[0], above[0]) == pytest.approx((-0.5, 1.5))
    assert below[1] < -0.5 < below[2] < 0 and 1 < above[1] < 1.5 < above[2]


@pytest.mark.parametrize(
    ("receiver", "sharer"),
    [
        (outcomes(50, 50), outcomes(50, 50)),
        (outcomes(50, 50), outcomes(51, 49)),
        (outcomes(1, 0), outcomes(0, 1)),
        (outcomes(0, 4), outcomes(4, 0)),
    ],
    ids=["the same", "not clearly different", "one row", "four rows"],
)
def test_no_gap_is_recovered_where_there_is_no_clear_gap(receiver, sharer):
    assert stats.gap_recovered(np.ones(len(receiver)), receiver, sharer, SHARE) is None


def test_a_gap_that_only_just_excludes_zero_still_gives_finite_limits():
    receiver, sharer = discordant(0, 5, neither=95)
    assert stats.paired(sharer, receiver, SHARE).low > 0
    found = stats.gap_recovered(np.repeat([1.0, 0.0], [50, 50]), receiver, sharer, SHARE)
    assert found is not None and all(map(math.isfinite, numbers(found)))


# calibration


def logprobs(confidence, letters=4):
    return np.log([confidence, *[(1 - confidence) / (letters - 1)] * (letters - 1)]).tolist()


def test_calibration_error_by_hand():
    # Bin (0.6, 0.7]: 2 rows, accuracy 0.5, confidence 0.65. Bin (0.9, 1]: 3 rows, accuracy 1/3, confidence 0.95.
    # Bin (0.2, 0.3]: 1 row, accuracy 1, confidence 0.28 with five letters.
    rows = [logprobs(0.65), logprobs(0.65), logprobs(0.93), logprobs(0.95), logprobs(0.97), logprobs(0.28, letters=5)]
    right = [1, 0, 1, 0, 0, 1]
    expected = 2 / 6 * abs(1 / 2 - 0.65) + 3 / 6 * abs(1 / 3 - 0.95) + 1 / 6 * abs(1 - 0.28)
    assert stats.calibration_error(rows, right) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("confidence", "right", "error"),
    [(1.0, [1, 1], 0.0), (1.0, [0, 0], 1.0), (0.75, [1, 1, 1, 0], 0.0), (0.75, [0, 0], 0.75), (0.55, [1], 0.45)],
)
def test_calibration_error_of_one_confidence_is_its_distance_from_the_accuracy(confidence, right, error):
    with np.errstate(divide="ignore"):
        rows = [logprobs(confidence)] * len(right)
    assert stats.calibration_error(rows, right) == pytest.approx(error)


def test_confidences_of_different_bins_do_not_cancel():
    # Too confident by 0.15 in one bin and too diffident by 0.15 in another: on average right, and still not calibrated.
    rows, right = [logprobs(0.65)] * 2 + [logprobs(0.85)] * 10, [1, 0] + [1] * 10
    assert stats.calibration_error(rows, right) == pytest.approx((2 * 0.15 + 10 * 0.15) / 12)


# percentiles


def test_percentiles_are_numpys():
    seconds = np.random.default_rng(0).gamma(3, size=57)
    assert stats.percentiles(seconds, (50, 90, 99)) == pytest.approx(np.percentile(seconds, [50, 90, 99]))
    assert stats.percentiles([2.5], (1, 50, 99)) == [2.5, 2.5, 2.5]
    assert stats.percentiles([1, 2], (50,)) == [1.5]


# all of them


@pytest.mark.parametrize("rows", [3, 30, 200])
def test_the_same_rows_give_the_same_numbers(rows):
    values = np.random.default_rng(1).random((3, rows))
    values[2] += 1  # a gap
    for function in (
        lambda: stats.mean(values[0]),
        lambda: stats.paired(*values[:2]),
        lambda: stats.gap_recovered(*values),
    ):
        assert function() == function()


@pytest.mark.parametrize("rows", [5, 60, 400])
@pytest.mark.parametrize("decimals", [0, 9])
def test_the_order_of_rows_does_not_matter(rows, decimals):
    rng = np.random.default_rng(3)
    columns = rng.random((3, rows)).round(decimals) + np.array([[0], [0], [1]])
    shuffled = columns[:, rng.permutation(rows)]
    for function in (lambda c: stats.mean(c[0]), lambda c: stats.paired(*c[:2]), lambda c: stats.gap_recovered(*c)):
        found, again = function(columns), function(shuffled)
        assert found is not None and again is not None
        assert numbers(found) == pytest.approx(numbers(again), abs=1e-12)


def test_an_estimate_leaves_the_global_random_state_alone():
    np.random.seed(3)
    expected = np.random.random()
    np.random.seed(3)
    stats.mean(np.arange(50.0))
    assert np.random.random() == expected


ONE, TWO = [1.0], [1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.wilson([]), "need rows"),
        (lambda: stats.wilson([[1, 0]]), r"shape \(1, 2\)"),
        (lambda: stats.wilson([1, 0.5]), "neither right nor wrong; got 0.5"),
        (lambda: stats.wilson([1, math.nan]), "impossible number; got nan"),
        (lambda: stats.mean([]), "need rows"),
        (lambda: stats.mean([1.0, math.inf]), "impossible number; got inf"),
        (lambda: stats.mean([0.2, 1.2], SHARE), r"got 1.2; allowed: finite, 0.0 to 1.0"),
        (lambda: stats.paired(ONE, TWO), "got 1 and 2 rows"),
        (lambda: stats.paired([0.0, -0.1], TWO, SHARE), "got -0.1"),
        (lambda: stats.mcnemar(ONE, TWO), "got 1 and 2 rows"),
        (lambda: stats.mcnemar([0.3], ONE), "neither right nor wrong"),
        (lambda: stats.mcnemar([], []), "need rows"),
        (lambda: stats.gap_recovered(ONE, TWO, TWO), "the same rows"),
        (lambda: stats.gap_recovered(TWO, ONE, TWO), "the same rows"),
        (lambda: stats.gap_recovered(TWO, TWO, [math.nan, 1.0]), "impossible number"),
        (lambda: stats.calibration_error([[-1.0], []], TWO), "no letter likelihoods"),
        (lambda: stats.calibration_error([], []), "need rows"),
        (lambda: stats.calibration_error([[-0.1]], TWO), "the same rows"),
        (lambda: stats.calibration_error([[0.4]], ONE), "above 1"),
        (lambda: stats.calibration_error([[-0.1]], [0.5]), "neither right nor wrong"),
        (lambda: stats.percentiles([], (50,)), "need rows"),
    ],
)
def test_impossible_rows_are_refused(call, message):
    with pytest.raises(DataError, match=message):
        call()
