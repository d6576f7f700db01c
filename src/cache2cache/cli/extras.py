"""Optional libraries: what is missing is said at once, and not after an hour."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

from cache2cache.errors import MissingExtraError


def need(command: str, extra: str, libraries: Sequence[str]) -> None:
    """Raise MissingExtraError unless all libraries of an extra are installed. Imports none of them."""
    missing = [name for name in libraries if importlib.util.find_spec(name) is None]
    if missing:
        raise MissingExtraError(
            f"{command} needs more libraries",
            got=f"no {', '.join(missing)}",
            hint=f"pip install 'cache2cache[{extra}]'",
        )
