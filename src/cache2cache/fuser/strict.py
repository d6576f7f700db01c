"""What is wrong with weights or configs, in words: all of it at once, so that one look is enough."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from pydantic import ValidationError

from cache2cache.errors import FuserFormatError

_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def check_weights(source: object, expected: Mapping[str, torch.Size], state: Mapping[str, torch.Tensor]) -> None:
    """Raise FuserFormatError unless the state dict has exactly the expected tensors, all floats and finite.

    Args:
        source: the file or folder that the message names.
    """
    faults = [f"{name} is missing" for name in expected if name not in state]
    faults += [f"{name} is not expected" for name in state if name not in expected]
    for name, x in state.items():
        if name in expected and x.shape != expected[name]:
            faults.append(f"{name} has shape {tuple(x.shape)} instead of {tuple(expected[name])}")
        elif x.dtype not in _FLOATS:
            faults.append(f"{name} has dtype {x.dtype} instead of a float of 16 bits or more")
        elif not x.isfinite().all():
            faults.append(f"{name} has values that are not finite")
    if faults:
        raise FuserFormatError(
            f"the weights in {source} are not those that the config promises",
            got="; ".join(faults),
            hint="Fetch or save the fuser again",
        )


def in_words(error: ValidationError) -> str:
    """Which fields are wrong and why, in one line."""
    faults = (
        (".".join(map(str, fault["loc"])), fault["msg"].removeprefix("Value error, ")) for fault in error.errors()
    )
    return "; ".join(f"{place}: {said}" if place else said for place, said in faults)
