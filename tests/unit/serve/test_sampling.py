from __future__ import annotations

import math

import pytest
import torch

from cache2cache.errors import RequestError
from cache2cache.serve.engine import Sampling
from cache2cache.serve.sampling import Draw, Sampler, check

LOGITS = torch.tensor([1.0, 3.0, -2.0, 2.0, 0.0])


def frequencies(sampling: Sampling, draws: int = 4000) -> torch.Tensor:
    draw = Draw(sampling)
    return torch.bincount(torch.tensor([draw(LOGITS).token for _ in range(draws)]), minlength=5) / draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_distribution(temperature):
    expected = (LOGITS / temperature).softmax(-1)
    torch.testing.assert_close(frequencies(Sampling(temperature=temperature)), expected, atol=0.025, rtol=0)


@pytest.mark.parametrize(("top_p", "nucleus"), [(0.01, [1]), (0.6, [1]), (0.7, [1, 3]), (0.95, [0, 1, 3])])
def test_draws_stay_in_the_nucleus(top_p, nucleus):
    """Probabilities of the logits: 0.66 for token 1, 0.24 for 3, 0.09 for 0."""
    expected = torch.zeros(5)
    expected[nucleus] = LOGITS[nucleus].softmax(-1)
    got = frequencies(Sampling(temperature=1.0, top_p=top_p))
    assert got.nonzero().flatten().tolist() == nucleus
    torch.testing.assert_close(got, expected, atol=0.025, rtol=0)


def test_temperature_0_takes_the_likeliest():
    assert {Draw(Sampling(seed=seed))(LOGITS).token for seed in range(20)} == {1}


def test_the_lowest_temperature_takes_the_likeliest():
    draw = Draw(Sampling(temperature=1e-6, logprobs=1))
    drawn = draw(LOGITS * 1e6)
    assert (drawn.token, drawn.logprob) == (1, 0.0)


def test_equal_seeds_draw_equally_and_others_do_not():
    one, same, other = (
        [draw(torch.zeros(100)).token for _ in range(10)]
        for draw in (Draw(Sampling(temperature=1.0, seed=seed)) for seed in (1, 1, 2))
    )
    assert one == same != other


@pytest.mark.parametrize("temperature", [0.0, 0.5, 1.0])
def test_logprobs_are_those_after_temperature_before_top_p(temperature):
    expected = (LOGITS / (temperature or 1.0)).log_softmax(-1)
    drawn = Draw(Sampling(temperature=temperature, top_p=0.5, logprobs=3))(LOGITS)
    assert drawn.logprob == pytest.approx(float(expected[drawn.token]))
    assert [token for token, _ in drawn.top] == [1, 3, 0]
    assert [logprob for _, logprob in drawn.top] == pytest.approx(expected[[1, 3, 0]].tolist())


def test_logprobs_are_reported_only_where_asked_for():
    assert Draw(Sampling())(LOGITS).logprob is None
    assert Draw(Sampling(temperature=1.0))(LOGITS).logprob is None
    assert Draw(Sampling(logprobs=0))(LOGITS).top == ()
    assert len(Draw(Sampling(logprobs=20))(LOGITS).top) == 5


def test_a_rows_draws_do_not_depend_on_its_neighbours():
    rules = [Sampling(), Sampling(temperature=1.0, seed=1), Sampling(temperature=2.0, top_p=0.8, seed=2, logprobs=2)]
    scores = torch.randn((6, 3, 50), generator=torch.Generator().manual_seed(0))
    sampler = Sampler([Draw(rule) for rule in rules])
    together = []
    for step in scores:
        chosen = sampler(torch.zeros((3, 1)), step)
        assert chosen.argmax(-1).tolist() == [drawn.token for drawn in sampler.drawn]
        together.append(sampler.drawn)
    for row, rule in enumerate(rules):
        draw = Draw(rule)
        assert [drawn[row] for drawn in together] == [draw(step[row]) for step in scores]


def test_leaves_generate_no_other_choice():
    out = Sampler([Draw(Sampling())])(torch.zeros((1, 1)), LOGITS[None])
    assert out.isfinite().sum() == 1


def test_numbers_that_are_none_are_no_token():
    sampler = Sampler([Draw(Sampling()), Draw(Sampling(temperature=1.0))])
    sampler(torch.zeros((2, 1)), torch.stack([LOGITS, torch.tensor([1.0, math.nan, 0.0, 0.0, 0.0])]))
    assert [drawn.token for drawn in sampler.drawn] == [1, None]


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_tokens=0),
        Sampling(temperature=-0.1),
        Sampling(temperature=1e-9),
        Sampling(temperature=math.nan),
        Sampling(temperature=math.inf),
        Sampling(top_p=0.0),
        Sampling(top_p=1.1),
        Sampling(top_p=math.nan),
        Sampling(seed=2**63),
        Sampling(stop=("",)),
        Sampling(logprobs=-1),
        Sampling(logprobs=21),
    ],
)
def test_options_out_of_range_are_refused_by_name(sampling):
    (name,) = [name for name in vars(sampling) if repr(getattr(sampling, name)) != repr(getattr(Sampling(), name))]
    with pytest.raises(RequestError, match=name):
        check(sampling)


def test_options_within_their_range_pass():
    check(Sampling(max_tokens=1, temperature=2.0, top_p=1.0, seed=-(2**63), stop=("a",), logprobs=20))
    check(Sampling())
