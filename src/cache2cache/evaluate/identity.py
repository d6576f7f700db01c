"""What a run is known by, so that it goes on only as what it was."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from cache2cache.evaluate.items import Item
from cache2cache.evaluate.names import Asked
from cache2cache.evaluate.settings import Settings
from cache2cache.evaluate.tasks.base import Loaded
from cache2cache.fuser.base import Fuser
from cache2cache.models.load import weights_fingerprint
from cache2cache.pipeline import C2C


def identity_of(settings: Settings, pair: C2C, asked: Sequence[Asked], loaded: Mapping[str, Loaded]) -> dict[str, Any]:
    """What must not change when a run goes on. Systems may be added, and asked more rows.

    Models, fusers and rows are known by what they hold, so that weights that were trained on, or a file that was edited, are
    noticed.
    """
    return {
        **settings.model_dump(mode="json", exclude={"systems", "controls", "tasks", "limit", "latency_rows"}),
        "models": [
            {
                **lm.card.model_dump(mode="json", include={"id", "revision", "tokenizer"}),
                "weights": weights_fingerprint(lm.model),
            }
            for lm in (pair.receiver, *pair.sharers)
        ],
        "weights": [weights_digest(fuser) for fuser in pair.fusers],
        "tasks": {
            name: {"source": x.source, "rows": len(x.items), "digest": rows_digest(x.items)}
            for name, x in loaded.items()
        },
        "systems": {
            one.name: {"fuser": one.fuser, "weights": one.fuser and weights_digest(Fuser.from_pretrained(one.fuser))}
            for one in asked
        },
    }


def weights_digest(fuser: Fuser) -> str:
    """What a fuser computes, in 16 hex digits."""
    digest = hashlib.sha256(fuser.config.model_dump_json().encode())
    for name, tensor in sorted(fuser.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def rows_digest(items: Sequence[Item]) -> str:
    """What is asked, in 16 hex digits."""
    return hashlib.sha256("\n".join(map(repr, items)).encode()).hexdigest()[:16]
