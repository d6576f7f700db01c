"""What a request asks of vLLM's connector, and where in the paged cache it goes."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from cache2cache.errors import PayloadError
from cache2cache.serve.payload import ids_digest
from cache2cache.serve.vllm.loading import Asked, Load, asked, heads_of
from cache2cache.serve.vllm.store import Fused

SALT = "c2c-" + "0123456789abcdef" * 2
NAME = f"{SALT}-0"
IDS = [5, 6, 7, 8, 9]


def test_a_request_without_a_cache_is_nobodys_business():
    for params in (None, {}, {"do_remote_prefill": True}):
        for salt in (None, "", "somebody's"):
            assert asked(params, salt, IDS, whole=True) is None


def test_a_request_with_its_cache():
    assert asked({"c2c_cache": NAME}, SALT, IDS, whole=False) == Asked(NAME, None)


@pytest.mark.parametrize(
    ("name", "salt", "ids", "whole", "problem"),
    [
        (None, SALT, IDS, False, "must name the cache"),
        ("../../etc/passwd", SALT, IDS, False, "no name"),
        (7, SALT, IDS, False, "no name"),
        (["x"], SALT, IDS, False, "no name"),
        ("", SALT, IDS, False, "no name"),
        (NAME, None, IDS, False, "cache_salt must be"),
        (NAME, "mine", IDS, False, "cache_salt must be"),
        (NAME, NAME, IDS, False, "cache_salt must be"),
        (NAME, SALT, None, False, "two tokens"),
        (NAME, SALT, [5], False, "two tokens"),
        (NAME, SALT, IDS, True, "probabilities"),
    ],
)
def test_a_request_that_must_fail(name: Any, salt: str | None, ids: list[int] | None, whole: bool, problem: str):
    """Whatever is wrong: vLLM would read the prompt itself, or find blocks that were fused with something else."""
    found = asked({"c2c_cache": name}, salt, ids, whole=whole)
    assert found is not None
    assert problem in str(found.problem)


@pytest.mark.parametrize(
    ("start", "blocks", "size", "expected"),
    [
        (0, [3], 8, [24, 25, 26, 27]),
        (0, [3, 1], 2, [6, 7, 2, 3]),
        (2, [3, 1], 2, [2, 3]),
        (0, [0, 4, 2], 3, [0, 1, 2, 12]),
        (4, [0, 4, 2], 2, []),
    ],
)
def test_slots(start: int, blocks: list[int], size: int, expected: list[int]):
    assert Load.of("r", Asked(NAME, None), IDS, start, blocks).slots(size).tolist() == expected


@pytest.mark.parametrize(
    ("ranks", "kv_heads", "expected"),
    [
        (1, 3, [[0, 1, 2]]),
        (2, 4, [[0, 1], [2, 3]]),
        (4, 4, [[0], [1], [2], [3]]),
        (4, 2, [[0], [0], [1], [1]]),
        (8, 1, [[0]] * 8),
    ],
)
def test_heads(ranks: int, kv_heads: int, expected: list[list[int]]):
    assert [list(heads_of(rank, ranks, kv_heads)) for rank in range(ranks)] == expected


class TestACache:
    LOAD = Load.of("r", Asked(NAME, None), IDS, 0, [0])
    FITS = Fused(layers=3, kv_heads=2, positions=4, head_dim=8, digest=ids_digest(IDS), file=None)

    def test_that_fits(self):
        self.LOAD.check(self.FITS, 3, 2, 8)

    @pytest.mark.parametrize(
        "other", [{"layers": 2}, {"kv_heads": 1}, {"positions": 5}, {"head_dim": 4}, {"digest": ids_digest([5])}]
    )
    def test_that_is_another_models_or_prompts(self, other: dict[str, Any]):
        with pytest.raises(PayloadError, match="another"):
            self.LOAD.check(replace(self.FITS, **other), 3, 2, 8)
