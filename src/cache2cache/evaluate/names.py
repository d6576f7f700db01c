"""Names of systems and controls as a user gives them: `t2t:300`, `self=runs/self/fuser`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from cache2cache.errors import DataError

SYSTEMS: Mapping[str, str] = MappingProxyType(
    {
        "receiver": "the receiver alone, asked in the form that serves it best on training rows",
        "sharer": "the sharer alone, asked in the form that serves it best on training rows",
        "t2t": "text-to-text as in the paper: the sharer writes background without seeing the options, the receiver reads it",
        "t2t-fair": "text-to-text in which the sharer sees all and may answer",
        "routing": "a router sends each question to receiver or sharer",
        "c2c": "the receiver answers from its cache, fused with the sharer's",
    }
)
"""Name → what it is."""

CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "mismatched": "C2C with the sharer's cache of another row of about the same length",
        "zeroed": "C2C with the mean of the sharer's features at every position",
        "random": "C2C with noise of the mean and covariance of the sharer's features",
        "self": "C2C whose sharer is the receiver itself, with a fuser trained so (the paper's Identical)",
        "without-sharer": "a fuser of the same size, trained and used on the mean sharer features: what its parameters bring",
    }
)
"""Name → what it is."""


def definition(name: str) -> str:
    """What a system is; also of `sharer-2`, `c2c-1`, … where there are several sharers.

    Raises:
        KeyError: no system is called so.
    """
    return {**SYSTEMS, **CONTROLS}[base(name)]


def base(name: str) -> str:
    """What was asked for where a system is called so: `c2c` of `c2c-2`."""
    return name if name in SYSTEMS or name in CONTROLS else name.rpartition("-")[0]


TRAINED = ("self", "without-sharer")
"""Controls that need a fuser of their own."""


@dataclass(frozen=True)
class Asked:
    """A system or control to run."""

    name: str
    limit: int | None = None
    """Only the first rows of each task's sample."""
    fuser: str | None = None
    """The fuser of a control that needs one."""

    def __str__(self) -> str:
        limit = "" if self.limit is None else f":{self.limit}"
        return f"{self.name}{limit}" + (f"={self.fuser}" if self.fuser else "")


def parse(systems: str, controls: str = "") -> list[Asked]:
    """Both lists, comma-separated, in their order.

    Raises:
        DataError: an unknown or repeated name, a limit that is no positive number, a fuser missing or not wanted.
    """
    asked = [_asked(text, SYSTEMS, "system") for text in _split(systems)]
    asked += [_asked(text, CONTROLS, "control") for text in _split(controls)]
    names = [one.name for one in asked]
    if not names:
        raise DataError("no system was asked for", allowed=", ".join(SYSTEMS))
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise DataError("a system was asked for twice", got=", ".join(repeated))
    return asked


def _split(text: str) -> Sequence[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _asked(text: str, known: Mapping[str, str], kind: str) -> Asked:
    name, equals, fuser = text.partition("=")
    name, colon, limit = name.partition(":")
    if name not in known:
        close = difflib.get_close_matches(name, known, 1)
        raise DataError(
            f"unknown {kind}", got=name, allowed=", ".join(known), hint=f"Did you mean {close[0]}?" if close else None
        )
    if (name in TRAINED) != bool(equals and fuser):
        if name in TRAINED:
            raise DataError(f"the control {name} needs its own fuser", got=text, allowed=f"{name}=FUSER")
        raise DataError(f"the {kind} {name} takes no fuser", got=text, allowed=name)
    if colon and not (limit.isascii() and limit.isdigit() and int(limit) > 0):
        raise DataError(f"the limit of {name} is no positive number", got=limit, allowed=f"{name}:300")
    if colon and name == "mismatched":
        raise DataError("mismatched takes no limit of its own: its rows are paired over the whole sample", got=text)
    return Asked(name, int(limit) if colon else None, fuser or None)
