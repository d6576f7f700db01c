"""A pair by name: models here, sharers elsewhere, fusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from cache2cache.errors import MissingExtraError
from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel, Sharer, check_device, load

if TYPE_CHECKING:
    from cache2cache.serve.remote import RemoteOptions

ADDRESSES = ("http://", "https://")
"""How the name of a sharer begins that is elsewhere."""


def load_pair(
    receiver: str | Path,
    sharers: str | Path | Sequence[str | Path],
    fusers: str | Path | Fuser | Sequence[str | Path | Fuser],
    *,
    device: str | torch.device,
    sharer_device: str | torch.device,
    remote: RemoteOptions | None,
    **options: Any,
) -> tuple[LanguageModel, list[Sharer], list[Fuser]]:
    """Receiver, sharers and fusers; for arguments and errors see `C2C.from_pretrained`."""
    for name in {str(device), str(sharer_device)}:
        check_device(name)
    sharers = [sharers] if isinstance(sharers, str | Path) else sharers
    fusers = [fusers] if isinstance(fusers, str | Path | Fuser) else fusers
    loaded = [f if isinstance(f, Fuser) else Fuser.from_pretrained(f) for f in fusers]
    # Asked first: a service that does not answer is noticed before anything large is loaded.
    elsewhere = {s: _connect(s, remote) for s in map(str, sharers) if s.startswith(ADDRESSES)}
    own = load(receiver, device=device, **options)
    return own, [elsewhere.get(str(s)) or load(s, device=sharer_device, **options) for s in sharers], loaded


def _connect(address: str, options: RemoteOptions | None) -> Sharer:
    try:
        from cache2cache.serve.remote import RemoteSharer
    except ImportError as error:
        raise MissingExtraError(
            "a sharer elsewhere needs more libraries", got=str(error), hint="pip install 'cache2cache[serve]'"
        ) from error
    return RemoteSharer.connect(address, options)
