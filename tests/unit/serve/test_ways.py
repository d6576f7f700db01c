"""Which model ids there are, and who speaks."""

import pytest

from cache2cache.errors import RequestError, UnknownModelError
from cache2cache.serve.ways import Ways


@pytest.mark.parametrize(
    ("receiver", "sharers", "expected"),
    [
        (
            "small",
            ["big"],
            [("small+big", (0,), None), ("small", (), None), ("big", (), 0)],
        ),
        (
            "small",
            ["a", "b"],
            [("small+a+b", (0, 1), None), ("small", (), None), ("a", (), 0), ("b", (), 1)],
        ),
        ("same", ["same"], [("same+same", (0,), None), ("same", (), None), ("same:0", (), 0)]),
        (
            "small",
            ["big", "big"],
            [("small+big+big", (0, 1), None), ("small", (), None), ("big:0", (), 0), ("big:1", (), 1)],
        ),
        ("small", [], [("small", (), None)]),
    ],
)
def test_all_ways(receiver: str, sharers: list[str], expected: list[tuple]):
    ways = Ways(receiver, sharers, range(len(sharers)))
    assert [(way.id, way.sharers, way.alone) for way in ways] == expected
    assert all(ways.find(way.id) is way for way in ways)


def test_a_sharer_that_is_elsewhere_is_listened_to_but_does_not_answer():
    ways = Ways("small", ["here", "elsewhere"], [0])
    assert [(way.id, way.sharers, way.alone) for way in ways] == [
        ("small+here+elsewhere", (0, 1), None),
        ("small", (), None),
        ("here", (), 0),
    ]


def test_an_unknown_model():
    with pytest.raises(UnknownModelError, match=r"no such model; got 'gpt'; allowed: small\+big, small, big"):
        Ways("small", ["big"], [0]).find("gpt")


@pytest.mark.parametrize(
    ("model", "asked", "speaking"),
    [
        ("small+a+b", None, (0, 1)),
        ("small+a+b", [], ()),
        ("small+a+b", ["b"], (1,)),
        ("small+a+b", ["b", "a"], (0, 1)),
        ("small+a+b", [1], (1,)),
        ("small+a+b", ["b", 0], (0, 1)),
        ("small", None, ()),
        ("small", [], ()),
        ("a", None, ()),
    ],
)
def test_who_speaks(model: str, asked: list[str | int] | None, speaking: tuple[int, ...]):
    ways = Ways("small", ["a", "b"], [0, 1])
    assert ways.speaking(ways.find(model), asked) == speaking


@pytest.mark.parametrize(
    ("model", "asked", "problem"),
    [
        ("small+a+b", ["c"], "no such sharer"),
        ("small+a+b", ["small"], "no such sharer"),
        ("small+a+b", [2], "no such sharer"),
        ("small+a+b", [-1], "no such sharer"),
        ("small+a+b", ["1"], "no such sharer"),
        ("small+a+b", ["a", "a"], "named twice"),
        ("small+a+b", ["a", 0], "named twice"),
        ("small", ["a"], "answers alone"),
        ("a", [1], "answers alone"),
    ],
)
def test_who_cannot_speak(model: str, asked: list[str | int], problem: str):
    ways = Ways("small", ["a", "b"], [0, 1])
    with pytest.raises(RequestError, match=problem) as refused:
        ways.speaking(ways.find(model), asked)
    assert refused.value.field == "sharers"
