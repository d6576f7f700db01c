"""The order of rows: decided by seed and epoch alone, by length if wanted, on any number of processes."""

import random

import pytest
import torch
from accelerate import skip_first_batches
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from cache2cache.train.order import Order

LENGTHS = [random.Random(i).randrange(10, 500) for i in range(103)]


def batched(rows, size):
    return [tuple(rows[at : at + size]) for at in range(0, len(rows), size)]


def epoch(order, number):
    order.set_epoch(number)
    return list(order)


@pytest.mark.parametrize("group", [None, 8])
def test_every_row_comes_once_in_an_order_of_seed_and_epoch(group):
    order = Order(LENGTHS, seed=0, group=group)
    first, second = epoch(order, 0), epoch(order, 1)
    assert len(order) == len(LENGTHS)
    assert sorted(first) == sorted(second) == list(range(len(LENGTHS))) != first
    assert first != second and first != epoch(Order(LENGTHS, seed=1, group=group), 0)
    torch.manual_seed(7)
    random.seed(7)
    assert epoch(Order(LENGTHS, seed=0, group=group), 1) == second, "global generators must not matter"


def test_a_pass_can_be_repeated():
    order = Order(LENGTHS, seed=0)
    assert list(order) == list(order)


def test_groups_hold_rows_of_about_one_length_in_shuffled_order():
    groups = batched(epoch(Order(LENGTHS, seed=0, group=8), 0), 8)
    assert [len(group) for group in groups] == [8] * 12 + [7], "the group that is not full comes last"
    means = [sum(LENGTHS[row] for row in group) / 8 for group in groups[:-1]]
    spread = [max(LENGTHS[row] for row in group) - min(LENGTHS[row] for row in group) for group in groups[:-1]]
    assert max(spread) < 150 < 400 < max(LENGTHS) - min(LENGTHS)
    assert means != sorted(means) and means != sorted(means, reverse=True)


def test_groups_are_others_in_every_epoch():
    lengths = [random.Random(i).randrange(10, 500) for i in range(2000)]
    order = Order(lengths, seed=0, group=4)
    first, second = ({frozenset(group) for group in batched(epoch(order, k), 4)} for k in (0, 1))
    assert len(first & second) < 50


def loaders(processes, group=None):
    """What accelerate makes of the order on each process, with batches of 4."""
    made = []
    for index in range(processes):
        order = Order(LENGTHS[:96], seed=0, group=group)
        loader = DataLoader(list(range(96)), batch_size=4, sampler=order)
        options = {"num_processes": processes, "process_index": index, "put_on_device": False, "rng_types": []}
        made.append((order, prepare_data_loader(loader, **options)))
    return made


def batches(loader):
    return [tuple(batch.tolist()) for batch in loader]


@pytest.mark.parametrize("number", [0, 2])
def test_processes_share_the_order_batch_by_batch(number):
    parts = []
    for _, loader in loaders(2):
        loader.set_epoch(number)
        parts.append(batches(loader))
    joined = [batch for step in zip(*parts, strict=True) for batch in step]
    assert joined == batched(epoch(Order(LENGTHS[:96], seed=0), number), 4)


@pytest.mark.parametrize("processes", [1, 2])
def test_a_resumed_pass_goes_on_where_it_stopped(processes):
    """On several processes accelerate's `set_epoch` does not reach behind skipped batches, so the order is told."""
    for order, loader in loaders(processes, group=8):
        loader.set_epoch(1)
        whole = batches(loader)
        order.set_epoch(0)
        rest = skip_first_batches(loader, 3)
        rest.set_epoch(1)
        order.set_epoch(1)
        assert batches(rest) == whole[3:]
