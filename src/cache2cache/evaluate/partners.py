"""The mismatched control: which other row's cache each row is given.

Rows are matched in length as well as the data allow, since a cache of another length would differ in more than in what
it is about. Knows no batches.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import combinations

from cache2cache.errors import DataError
from cache2cache.evaluate.items import Item

Length = Callable[[Item], int]
"""How long a row is, in tokens."""


def partners(items: Sequence[Item], length: Length) -> dict[str, str]:
    """Id of each row → id of the row whose cache it is given: the next one of its group, and the first of the last.

    Raises:
        DataError: see `match`.
    """
    return {
        row.id: other.id
        for group in match(items, length)
        for row, other in zip(group, (*group[1:], group[0]), strict=True)
    }


def match(items: Sequence[Item], length: Length) -> list[tuple[Item, ...]]:
    """Rows in pairs that ask different questions, and one triple if their number is odd; the longest first.

    The longest row that is left takes the next shorter one, as long as what then remains can still be matched.

    Raises:
        DataError: no such grouping exists.
    """
    check_matchable(items)
    # The sort is stable: equal lengths stay in the task's order.
    waiting = [(question(item), item) for item in sorted(items, key=length, reverse=True)]
    left = Counter(text for text, _ in waiting)
    most = max(left.values())
    groups = []
    while waiting:
        group = _next_group(waiting, left, most)
        groups.append(tuple(waiting[i][1] for i in group))
        left.subtract(waiting[i][0] for i in group)
        for i in reversed(group):
            del waiting[i]
    return groups


def check_matchable(items: Sequence[Item]) -> None:
    """Refuse rows that have no partners.

    Raises:
        DataError: there is no grouping in which every row meets another question.
    """
    if problem := unmatchable(items):
        raise DataError(
            f"no row of {items[0].task if items else 'the task'} may be given the cache of its own question",
            got=problem,
            allowed="at least two rows, at most half of them with the same question",
            hint="Leave out the mismatched control, or take more rows",
        )


def unmatchable(items: Sequence[Item]) -> str | None:
    """Why these rows have no partners, None if they have.

    A permutation in which every row meets another question exists if and only if no question is asked by more than half
    of the rows (Hall's theorem); pairs and one triple are then enough.
    """
    if len(items) < 2:
        return f"{len(items)} rows" if not items else "a single row"
    ((_, most),) = Counter(map(question, items)).most_common(1)
    return f"{most} of {len(items)} rows with the same question" if 2 * most > len(items) else None


def question(item: Item) -> str:
    """What two rows must not have in common: the question without options, upper case and white space apart."""
    return " ".join(item.topic.casefold().split())


def _next_group(waiting: Sequence[tuple[str, Item]], left: Counter[str], most: int) -> tuple[int, ...]:
    """Positions of the longest row and of those that it is grouped with, the nearest that leave a matchable rest.

    Args:
        waiting: the rows that are left with their questions, the longest first.
        left: how many of these rows ask each question.
        most: no question is asked by more of them than this.
    """
    for size in (2, 3):
        rest = len(waiting) - size
        for others in combinations(range(1, len(waiting)), size - 1):
            group = {waiting[i][0] for i in (0, *others)}
            # The first of the two conditions implies the second, which takes long.
            if len(group) == size and (
                2 * most <= rest or all(2 * (n - (text in group)) <= rest for text, n in left.items())
            ):
                return (0, *others)
    raise AssertionError("rows that can be matched have a group to begin with")
