"""What a run will ask: partners for the mismatched control, batches, limits."""

from itertools import pairwise, permutations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.partners import match, partners, question
from cache2cache.evaluate.plan import make_plan


def item(number: int, text: str, length: int = 0, task: str = "arc") -> Item:
    return Item(task, f"{length}-{number}", "", {"plain": [{"role": "user", "content": text}]}, topic=text, target="A")


def length(row: Item) -> int:
    return int(row.id.split("-")[0])


def rows(*kinds: tuple[str, int]) -> list[Item]:
    """Rows from (question, length)."""
    return [item(i, text, tokens) for i, (text, tokens) in enumerate(kinds)]


def different(*lengths: int) -> list[Item]:
    """Rows that all ask different questions."""
    return rows(*((f"question {i}", tokens) for i, tokens in enumerate(lengths)))


def possible(items: list[Item]) -> bool:
    """Whether any permutation gives every row another row's question, by trying all."""
    texts = [question(row) for row in items]
    return any(all(a != b for a, b in zip(texts, other, strict=True)) for other in permutations(texts))


kinds = st.tuples(st.sampled_from("abcd"), st.integers(0, 30))
few = st.lists(kinds, min_size=1, max_size=5).map(lambda found: rows(*found))
many = st.lists(st.tuples(st.sampled_from("abcdefghij"), st.integers(0, 30)), max_size=60).map(
    lambda found: rows(*found)
)


@given(few)
def test_partners_exist_whenever_any_permutation_does(items):
    if possible(items):
        assert len(partners(items, length)) == len(items)
    else:
        with pytest.raises(DataError, match="single row|same question"):
            partners(items, length)


@given(many, st.integers(2, 9))
def test_no_row_gets_its_own_cache_nor_one_of_the_same_question(items, batch_size):
    texts = [question(row) for row in items]
    if not items or 2 * max(map(texts.count, texts)) > len(items):
        return
    plan = make_plan({"arc": items}, ["mismatched"], length, batch_size=batch_size, paired=["mismatched"])
    partner, by_id = partners(items, length), {row.id: row for row in items}
    assert sorted(partner) == sorted(partner.values()) == sorted(by_id), "a permutation of all rows"
    assert all(question(by_id[a]) != question(by_id[b]) for a, b in partner.items())
    batch_of = {row.id: number for number, batch in enumerate(plan.batches) for row in batch.items}
    assert all(batch_of[a] == batch_of[b] for a, b in partner.items())
    assert max(map(len, plan.batches)) <= max(batch_size, 3 if len(items) % 2 else 2)
    cycles = {frozenset({a, b, partner[b]}) for a, b in partner.items()}
    assert sorted(map(len, cycles)) == [2] * (len(items) // 2 - len(items) % 2) + [3] * (len(items) % 2)
    assert plan == make_plan({"arc": items}, ["mismatched"], length, batch_size=batch_size, paired=["mismatched"])


@given(st.lists(st.integers(0, 40), min_size=2, max_size=6).filter(lambda found: len(found) % 2 == 0))
def test_pairs_differ_in_length_as_little_as_possible(lengths):
    def total(order) -> int:
        return sum(abs(order[i] - order[i + 1]) for i in range(0, len(order), 2))

    pairs = match(different(*lengths), length)
    assert total([length(row) for pair in pairs for row in pair]) == min(map(total, permutations(lengths)))


@pytest.mark.parametrize(
    ("items", "lengths"),
    [
        (different(1, 9, 2, 8), [(9, 8), (2, 1)]),
        (different(5, 1, 3, 2, 4), [(5, 4), (3, 2, 1)]),
        (rows(("a", 9), ("a", 8), ("b", 7), ("b", 6)), [(9, 7), (8, 6)]),
        # 9 and 8 would leave three rows of one question
        (rows(("a", 9), ("b", 8), ("c", 7), ("c", 6), ("c", 5), ("d", 4)), [(9, 7), (8, 6), (5, 4)]),
        # no pair of the longest row leaves a rest that can be matched, a triple does
        (rows(("c", 9), ("a", 8), ("a", 7), ("b", 6), ("b", 5)), [(9, 8, 6), (7, 5)]),
        (rows(("Which  gas?", 9), ("which gas?", 8), ("b", 1), ("c", 0)), [(9, 1), (8, 0)]),
    ],
)
def test_the_longest_row_takes_the_nearest_that_leaves_a_matchable_rest(items, lengths):
    assert [tuple(map(length, group)) for group in match(items, length)] == lengths


@pytest.mark.parametrize(
    ("items", "words"),
    [
        ([], "0 rows"),
        (different(3), "a single row"),
        (rows(("a", 1), ("a", 2)), "2 of 2 rows with the same question"),
        (rows(("a", 1), ("a", 2), ("b", 3)), "2 of 3 rows with the same question"),
    ],
)
def test_rows_without_partners_say_why(items, words):
    with pytest.raises(DataError, match=f"{words}.*Leave out the mismatched control"):
        partners(items, length)


def test_rows_without_partners_are_planned_if_nobody_needs_one():
    plan = make_plan({"arc": different(3)}, ["c2c"], length, batch_size=4)
    assert [len(batch) for batch in plan.batches] == [1]
    with pytest.raises(DataError, match="a single row"):
        make_plan({"arc": different(3)}, ["c2c"], length, batch_size=4, paired=["c2c"])


@given(
    st.lists(st.integers(0, 30), min_size=1, max_size=40),
    st.integers(2, 9),
    st.dictionaries(st.sampled_from(["b", "c"]), st.integers(1, 50)),
)
def test_every_row_is_planned_once_per_system_and_limits_are_nested(lengths, batch_size, limits):
    items = different(*lengths)
    plan = make_plan({"arc": items}, ["a", "b", "c"], length, batch_size=batch_size, limits=limits)
    keys = list(plan.keys())
    assert sorted(keys) == sorted(
        ("arc", name, row.id) for name in "abc" for row in items[: limits.get(name, len(items))]
    )
    assert plan.rows() == {("arc", name): min(limits.get(name, len(items)), len(items)) for name in "abc"}
    whole = make_plan({"arc": items}, ["a"], length, batch_size=batch_size)
    assert [b.items for b in plan.batches if "a" in b.systems] == [b.items for b in whole.batches], (
        "who else is asked, and how much, changes no batch"
    )


def test_batches_are_full_and_begin_with_the_longest_of_each_task():
    tasks = {"arc": different(*range(20)), "mmlu": [item(i, str(i), i, task="mmlu") for i in range(5)]}
    plan = make_plan(tasks, ["a"], length, batch_size=8)
    assert [(batch.task, len(batch)) for batch in plan.batches] == [
        ("arc", 8), ("arc", 8), ("arc", 4), ("mmlu", 5),
    ]  # fmt: skip
    widths = [max(batch.lengths) for batch in plan.batches[:3]]
    assert all(a >= b for a, b in pairwise(widths))
    assert [batch.tokens for batch in plan.batches] == [8 * 19, 8 * 11, 4 * 3, 5 * 4]
    assert all(tuple(map(length, batch.items)) == batch.lengths for batch in plan.batches)


def test_equal_limits_share_batches_and_a_limit_above_the_rows_is_none():
    plan = make_plan(
        {"arc": different(*range(10))}, ["a", "b", "c", "d"], length, batch_size=4, limits={"b": 3, "c": 99, "d": 3}
    )
    assert [(batch.systems, len(batch)) for batch in plan.batches] == [
        (("a", "c"), 4), (("a", "c"), 4), (("a", "c"), 2), (("b", "d"), 3),
    ]  # fmt: skip


GOOD = {"tasks": {"arc": different(1, 2, 3, 4)}, "systems": ["a", "b"], "batch_size": 4}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"tasks": {}}, "needs tasks and systems"),
        ({"systems": []}, "needs tasks and systems"),
        ({"tasks": {"arc": []}}, "arc has no rows"),
        ({"tasks": {"arc": [*different(1), *different(1)]}}, "occur more than once; got 1-0"),
        ({"tasks": {"mmlu": different(1, 2)}}, "another task.*arc/1-0"),
        ({"systems": ["a", "a"]}, "named twice; got a"),
        ({"batch_size": 1}, "batch size.*got 1"),
        ({"limits": {"c": 3}}, "not part of the run; got c; allowed: a, b"),
        ({"paired": ["c"]}, "not part of the run; got c"),
        ({"limits": {"a": 0}}, "limit of a.*got 0"),
        ({"limits": {"a": 3}, "paired": ["a"]}, "a cannot have a limit.*limit the sample"),
    ],
)
def test_bad_plans_are_refused(changed, words):
    arguments = GOOD | changed
    with pytest.raises(DataError, match=words):
        make_plan(arguments.pop("tasks"), arguments.pop("systems"), length, **arguments)
