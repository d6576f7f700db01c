"""The terms of the objective against their formulas."""

import math

import pytest
import torch
from torch.nn import functional

from cache2cache.train.objective import departure, divergence, hinge, nats


@pytest.mark.parametrize("count", [0, 1, 256, 257])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nats_are_the_cross_entropy_in_float32(count, dtype):
    """Also where the positions do not fit into one part."""
    torch.manual_seed(0)
    logits = torch.randn(count, 11).to(dtype).requires_grad_()
    labels = torch.randint(0, 11, (count,))
    got = nats(logits, labels)
    twin = logits.detach().clone().requires_grad_()
    expected = functional.cross_entropy(twin.float(), labels, reduction="none")
    assert got.dtype == torch.float32 and torch.equal(got, expected)
    got.sum().backward()
    expected.sum().backward()
    assert torch.equal(logits.grad, twin.grad)


def test_nats_keep_no_copy_of_the_logits_for_the_backward_pass():
    logits = torch.randn(600, 50, dtype=torch.bfloat16, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        loss = nats(logits, torch.zeros(600, dtype=torch.long)).sum()
    assert not [x.shape for x in saved if x.dtype == torch.float32 and x.numel() >= logits.numel() // 3]
    loss.backward()


@pytest.mark.parametrize("count", [3, 257])
def test_departure_is_the_kl_over_all_tokens(count):
    torch.manual_seed(0)
    logits, alone = torch.randn(2, count, 9)
    p, q = torch.distributions.Categorical(logits=alone), torch.distributions.Categorical(logits=logits)
    torch.testing.assert_close(departure(logits, alone), torch.distributions.kl_divergence(p, q))


def test_departure_pulls_a_model_back_to_what_it_says_alone():
    torch.manual_seed(0)
    alone = torch.randn(4, 9, dtype=torch.bfloat16)
    assert torch.equal(departure(alone, alone), torch.zeros(4))
    logits = (alone.float() + torch.randn(4, 9)).requires_grad_()
    before = departure(logits, alone).sum()
    before.backward()
    pulled = logits.grad
    torch.testing.assert_close(pulled, logits.softmax(1) - alone.float().softmax(1))


def test_divergence_is_the_kl_over_the_teachers_tokens():
    torch.manual_seed(0)
    logits, ids = torch.randn(2, 9), torch.tensor([[1, 4, 7], [0, 8, 3]])
    teacher = torch.randn(2, 3).log_softmax(1)
    expected = [
        sum(
            math.exp(p) * (p - q)
            for p, q in zip(teacher[k].tolist(), logits[k, ids[k]].log_softmax(0).tolist(), strict=True)
        )
        for k in range(2)
    ]
    torch.testing.assert_close(divergence(logits, ids, teacher), torch.tensor(expected))


def test_divergence_ignores_tokens_that_are_not_there():
    logits = torch.tensor([[1.0, 2.0, 3.0, 100.0]], requires_grad=True)
    ids, teacher = torch.tensor([[0, 1, 3]]), torch.tensor([[math.log(0.25), math.log(0.75), -math.inf]])
    got = divergence(logits, ids, teacher)
    torch.testing.assert_close(got, divergence(logits, ids[:, :2], teacher[:, :2]))
    got.sum().backward()
    assert logits.grad.isfinite().all() and logits.grad[0, 3] == 0


def test_divergence_is_zero_without_a_teacher_and_where_both_agree():
    logits = torch.randn(2, 5, requires_grad=True)
    ids = torch.tensor([[0, 1], [2, 3]])
    teacher = torch.stack([torch.full((2,), -math.inf), logits[1, ids[1]].detach().log_softmax(0)])
    got = divergence(logits, ids, teacher)
    torch.testing.assert_close(got, torch.zeros(2), atol=1e-6, rtol=0)
    got.sum().backward()
    assert logits.grad.isfinite().all() and not logits.grad[0].any()


@pytest.mark.parametrize(
    ("matched", "mismatched", "tokens", "expected"),
    [
        (4.0, 4.0, 2, 2.0),  # no difference: the whole margin, for both tokens
        (4.0, 5.0, 2, 1.0),
        (4.0, 6.0, 2, 0.0),
        (4.0, 9.0, 2, 0.0),  # more than the margin is not asked for
        (4.0, 3.0, 2, 3.0),  # the other row's cache is the better one
    ],
)
def test_the_hinge_wants_a_margin_per_token(matched, mismatched, tokens, expected):
    got = hinge(torch.tensor([matched]), torch.tensor([mismatched]), torch.tensor([tokens]), 1.0)
    assert got.tolist() == [expected]
