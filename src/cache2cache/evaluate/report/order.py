"""The order in which a report lists systems."""

from __future__ import annotations

import re
from collections.abc import Iterable

from cache2cache.evaluate.names import CONTROLS, SYSTEMS

STAGES = ("tokenise", "align", "sharer_prefill", "message", "receiver_prefill", "fuse", "decode")
"""Of a request, in the order in which they happen."""
_NAMES = [*SYSTEMS, *CONTROLS]


def base(name: str) -> tuple[str, int]:
    """What a system is one of, and which: c2c-2 is ("c2c", 2), c2c is ("c2c", 0)."""
    numbered = re.fullmatch(r"(.+)-(\d+)", name)
    return (numbered[1], int(numbered[2])) if numbered and numbered[1] in _NAMES else (name, 0)


def is_known(name: str) -> bool:
    """Whether it is one of `names`, or one of several of those."""
    return base(name)[0] in _NAMES


def is_control(name: str) -> bool:
    return name in CONTROLS


def ordered_stages(stages: Iterable[str]) -> list[str]:
    """Known stages in the order in which they happen, then the others by name."""
    found = set(stages)
    return [stage for stage in STAGES if stage in found] + sorted(found - set(STAGES))


def ordered(names: Iterable[str]) -> list[str]:
    """Known names in the order of `names`, then the others by name."""
    found = set(names)
    known = sorted(filter(is_known, found), key=lambda name: (_NAMES.index(base(name)[0]), base(name)[1]))
    return known + sorted(found - set(known))
