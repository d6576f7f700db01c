"""Prompts that begin alike: read in one pass, each has the cache that it has alone."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.models import kv, trees
from cache2cache.models.prefills import PrefillStore, prefill_rows, row_key
from cache2cache.testing import tiny_model

BEGINNING, OTHER = list(range(50, 90)), list(range(89, 49, -1))
PROMPTS = [
    [*BEGINNING, 1, 2, 3],
    [*OTHER, 7],
    [5, 6],
    [*BEGINNING, 1, 9],
    BEGINNING,
    [*OTHER, 8, 8, 8, 8],
    BEGINNING[:35],
]


def keys_of(prompts) -> list[str]:
    """None of which cuts a tree."""
    return [f"{i:x}1" for i in range(len(prompts))]


def test_prompts_that_begin_alike_are_in_one_tree():
    grown = trees.grow(PROMPTS, keys_of(PROMPTS))
    assert [(sorted(tree.rows), tree.shared, tree.tokens) for tree in grown] == [
        ([0, 3, 4, 6], 35, 35 + 8 + 7 + 5),
        ([1, 5], 40, 45),
        ([2], 2, 2),
    ]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ([*BEGINNING[:31], 1], [*BEGINNING[:31], 2]),  # too little in common
        ([*BEGINNING, 1], BEGINNING + [2] * 41),  # little of the longer one
    ],
)
def test_a_short_common_beginning_is_read_twice(first, second):
    assert len(trees.grow([first, second], keys_of("ab"))) == 2


@given(data=st.data(), ends=st.lists(st.integers(0, 6), min_size=1, max_size=60))
def test_what_some_trees_leave_over_grows_into_the_others(data, ends):
    beginnings = (BEGINNING, OTHER, [*BEGINNING, *OTHER])
    prompts = [[*beginnings[i % 3], *range(i // 4, i // 4 + 9 * end)] for i, end in enumerate(ends)]
    keys = [hashlib.sha256(bytes([i])).hexdigest() for i in range(len(prompts))]
    grown = trees.grow(prompts, keys)
    assert sorted(i for tree in grown for i in tree.rows) == list(range(len(prompts)))
    left = [tree for tree in grown if data.draw(st.booleans())]
    rest = sorted(i for tree in left for i in tree.rows)
    again = trees.grow([prompts[i] for i in rest], [keys[i] for i in rest])
    assert [[rest[i] for i in tree.rows] for tree in again] == [list(tree.rows) for tree in left]


def test_the_turns_of_a_long_conversation_do_not_become_one_tree():
    """Each is the beginning of the next, so the first and the last have little in common."""
    prompts = [list(range(50 * turn)) for turn in range(1, 41)]
    grown = trees.grow(prompts, [*map(row_key, prompts)])
    assert all(2 * tree.shared >= max(len(prompts[i]) for i in tree.rows) for tree in grown)
    assert max(tree.tokens for tree in grown) < 4096 < sum(map(len, prompts)) / 2
    assert sum(tree.tokens for tree in grown) < sum(map(len, prompts)) / 1.5


@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gpt2"])
def test_a_tree_gives_each_prompt_its_own_cache(kind):
    lm = tiny_model(kind)
    assert trees.readable(lm, 50)
    grown = trees.grow(PROMPTS, keys_of(PROMPTS))
    alone = [prefill_rows(lm, [ids])[0] for ids in PROMPTS]
    for got, expected in zip(trees.read(lm, PROMPTS, grown), alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    places = [np.arange(len(ids))[-3:][::-1] for ids in PROMPTS]
    parts = trees.read(lm, PROMPTS, grown, [None, *places[1:]], [1, 0])
    for got, expected, some in zip(parts, alone, [range(43), *places[1:]], strict=True):
        torch.testing.assert_close(got, expected[:, [1, 0]][:, :, :, list(some)], rtol=1e-5, atol=1e-5)


def test_a_window_must_hold_all_of_a_prompt():
    lm = tiny_model("gemma3")  # which sees 16 tokens
    assert trees.readable(lm, 16) and not trees.readable(lm, 17)


def test_a_model_that_takes_no_mask_of_its_own_reads_prompts_alone(monkeypatch):
    lm = tiny_model("llama")
    ignored = kv.prefill_masked
    monkeypatch.setattr(kv, "prefill_masked", lambda model, ids, at, mask: ignored(model, ids, at, mask[..., -1:, :]))
    assert not trees.readable(lm, 43)


def test_a_store_reads_a_common_beginning_once(tmp_path, monkeypatch):
    lm, read = tiny_model("llama"), []
    reading = kv.prefill_masked
    monkeypatch.setattr(kv, "prefill_masked", lambda model, ids, *rest: read.append(ids) or reading(model, ids, *rest))
    store = PrefillStore(tmp_path, lm.card, torch.float32)
    store.compute(lm, PROMPTS, [[0, len(ids) - 1] for ids in PROMPTS], batch_tokens=1)
    assert sum(ids.numel() for ids in read[1:]) < sum(map(len, PROMPTS)) / 2
    for ids in PROMPTS:
        (alone,) = prefill_rows(lm, [ids])
        torch.testing.assert_close(store.load(ids, [len(ids) - 1]), alone[:, :, :, -1:], rtol=1e-5, atol=1e-5)
    assert len({row_key(ids) for ids in PROMPTS}) == len(store)
