"""What is decided on training rows, and the means of the controls: rows that cannot be asked are left out and told."""

import errno
from dataclasses import replace

import numpy as np
import pytest

from cache2cache import C2C
from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate.asking import in_parts
from cache2cache.evaluate.forms import FORMS
from cache2cache.evaluate.heard import sharer_statistics
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.routing import Embedder
from cache2cache.evaluate.systems import Alone
from cache2cache.evaluate.training import choose_form, train_router
from cache2cache.testing import random_fuser, tiny_pair

RECEIVER, SHARER = tiny_pair()


def row(i: int, text: str = "") -> Item:
    said = [{"role": "user", "content": f"Question {i}: which? {text}\nA. {i}\nB. {i + 7}"}]
    wordings = dict.fromkeys(("plain", "bare", "paper"), said)
    return Item("quiz", str(i), "s", wordings, f"which {i}", "AB"[i % 2], letters="AB", max_new_tokens=4)


ROWS = [row(i) for i in range(12)]
LONG = row(5, "very long " * 3000)
"""Longer than both models' contexts."""
MIXED = [*ROWS[:5], LONG, *ROWS[6:]]


# Parts


class Asked:
    """Answers with ids; fails on parts of more rows than there is room for, and on some rows always."""

    def __init__(self, room: int = 99, broken: tuple[str, ...] = ()):
        self.room, self.broken, self.sizes = room, broken, []

    def __call__(self, items):
        self.sizes.append(len(items))
        if len(items) > self.room:
            raise MemoryError
        if found := [item.id for item in items if item.id in self.broken]:
            raise ValueError(f"row {found[0]} is odd")
        return [item.id for item in items]


def test_parts_answer_in_order():
    asked = Asked()
    assert in_parts(ROWS, 5, asked) == ([str(i) for i in range(12)], {})
    assert asked.sizes == [5, 5, 2]


def test_parts_that_are_too_large_are_halved_from_then_on():
    asked = Asked(room=3)
    assert in_parts(ROWS, 8, asked) == ([str(i) for i in range(12)], {})
    assert asked.sizes == [8, 4, 2, 2, 2, 2, 2, 2]


def test_a_row_that_fails_costs_no_other_row():
    found, failed = in_parts(ROWS, 4, Asked(broken=("5", "11")))
    assert found == [None if i in (5, 11) else str(i) for i in range(12)]
    assert failed == {f"quiz, row {i}": f"ValueError: row {i} is odd" for i in (5, 11)}


def test_rows_that_all_fail_and_a_full_disk_are_errors():
    with pytest.raises(
        EvaluationError, match="none of 2 rows could be asked; got quiz, row 0: ValueError: row 0 is odd"
    ):
        in_parts(ROWS[:2], 4, Asked(broken=("0", "1")))

    def full(items):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EvaluationError, match="the disk is full"):
        in_parts(ROWS, 4, full)
    assert in_parts([], 4, full) == ([], {})


# What uses them


def test_the_mean_leaves_out_a_row_that_cannot_be_read_and_says_so():
    pair, told = C2C(RECEIVER, [SHARER], [random_fuser(RECEIVER, SHARER, fuse_last=8)]), []
    (found,) = sharer_statistics(pair, MIXED, Prefills(), batch_size=5, tell=told.append)
    (expected,) = sharer_statistics(pair, [*ROWS[:5], *ROWS[6:]], Prefills(), batch_size=11, tell=told.append)
    assert found.mean.numpy() == pytest.approx(expected.mean.numpy(), abs=1e-5)
    (line,) = told
    assert line.startswith("left out of the mean of the sharer's features: quiz, row 5: ContextLengthError: ")


@pytest.mark.parametrize("batch_size", [1, 5])
def test_a_form_is_chosen_on_the_rows_that_can_be_asked(batch_size):
    told = []

    def chosen(rows):
        return choose_form(
            RECEIVER, rows, Prefills(), RECEIVER, given=None, sharer=False, batch_size=batch_size, tell=told.append
        )

    found, expected = chosen(MIXED), chosen([*ROWS[:5], *ROWS[6:]])
    assert found == expected and found.rows == 11
    (line,) = told
    assert line.startswith(
        f"left out of the choice of a form for {RECEIVER.card.id}: quiz, row 5: ContextLengthError: "
    )


def test_a_router_learns_from_the_rows_that_can_be_asked():
    prefills, told = Prefills(), []

    def alone(lm, sharer=False):
        return Alone("x", lm, {"text": FORMS["chat"]}, prefills, RECEIVER, sharer=sharer)

    def trained(rows):
        embed = Embedder(C2C(RECEIVER), prefills)
        return train_router(
            embed, alone(RECEIVER), alone(SHARER, True), rows, prefills, 0.5, batch_size=4, tell=told.append
        )

    # Models with random weights find some texts likelier than others, each its own.
    texts = [replace(item, letters="", target=f"{'xyzuvw'[int(item.id) % 6]} {item.id}") for item in MIXED]
    found, expected = trained(texts), trained([item for item in texts if item.id != "5"])
    assert found.training_rows == expected.training_rows == 11
    assert found.weights == pytest.approx(expected.weights, abs=1e-5)
    (line,) = told
    assert line.startswith("left out of the rows that the router learns from: quiz, row 5: ContextLengthError: ")


def test_rows_that_no_two_ways_share_are_refused(monkeypatch):
    from cache2cache.evaluate import training

    halves = iter((np.array([1.0, np.nan]), np.array([np.nan, 1.0])) * 2)
    monkeypatch.setattr(training, "served", lambda *_: (next(halves), {}))
    with pytest.raises(DataError, match="no training row can be asked in every way"):
        choose_form(
            RECEIVER, ROWS[:2], Prefills(), RECEIVER, given=None, sharer=False, batch_size=2, tell=lambda _: None
        )
