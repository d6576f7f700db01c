"""What of the sharers' caches crosses over to the receiver."""

from __future__ import annotations

from cache2cache.inputs import Row
from cache2cache.pipeline import C2C


def crossing_bytes(pair: C2C, row: Row) -> int:
    """Sharer cache that a fusion reads: each aligned position of each mapped layer once, keys and values."""
    total = 0
    for lm, fuser, part in zip(pair.sharers, pair.fusers, row.sharers, strict=True):
        if part is not None:
            positions = len(set(part.alignment[part.due > 0].tolist()))
            per_layer = 2 * lm.card.geometry.features * lm.dtype.itemsize
            total += positions * len(set(fuser.config.layer_map)) * per_layer
    return total
