"""Measuring memory counts each living tensor once; measuring time takes the median."""

from __future__ import annotations

import types

import pytest
import torch

from cache2cache.train import gauge
from cache2cache.train.gauge import peak, seconds

CPU = torch.device("cpu")
SIZE = 4 * 1000


def kept_together():
    return [torch.zeros(1000) for _ in range(3)]


def one_after_the_other():
    for _ in range(5):
        torch.zeros(1000)


def views():
    x = torch.zeros(1000)
    return x, x[10:], x.view(10, 100).t(), x.detach()


def in_place():
    return torch.zeros(1000).add_(1).mul_(2)


def saved_for_the_backward_pass():
    x = torch.zeros(1000, requires_grad=True)
    y = x.exp().exp().exp()  # x is a leaf; each exp keeps its result
    y.backward(torch.ones(1000))


@pytest.mark.parametrize(
    ("work", "tensors"),
    [
        (kept_together, 3),
        (one_after_the_other, 1),
        (views, 1),
        (in_place, 1),
        # x and three results, the gradient that goes in, and two that go from node to node.
        (saved_for_the_backward_pass, 7),
        (lambda: None, 0),
    ],
)
def test_peak_counts_what_lives(work, tensors):
    assert peak(work, CPU) == tensors * SIZE


def test_tensors_that_were_there_before_do_not_count():
    x = torch.zeros(1000)
    assert peak(lambda: (x[1:], x.add_(1)), CPU) == 0
    assert peak(lambda: x + 1, CPU) == SIZE


@pytest.mark.parametrize(
    ("taken", "expected"),
    [
        ([9.0, 5.0, 1.0], 3.0),  # long work is done twice after the warm-up
        ([9.0, 0.5, 0.2, 0.4], 0.4),
        ([9.0] + [0.01] * 20, 0.01),
    ],
)
def test_seconds_are_the_median_without_the_warm_up(taken, expected, monkeypatch):
    now = [0.0]
    durations = iter(taken)

    def work():
        now[0] += next(durations)

    monkeypatch.setattr(gauge, "time", types.SimpleNamespace(perf_counter=lambda: now[0]))
    assert seconds(work, CPU) == pytest.approx(expected)
