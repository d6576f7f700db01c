"""Which sharer layer each receiver layer listens to."""

from __future__ import annotations

from collections.abc import Callable

LayerMap = tuple[int, ...]
"""One sharer layer per receiver layer."""


def last_aligned(receiver_layers: int, sharer_layers: int) -> LayerMap:
    """Last layer to last layer, and so on backwards; receiver layers that are left over share sharer layer 0.

    Source: arXiv 2510.03215, A.1.1, "terminal alignment".
    """
    return tuple(max(0, sharer_layers - receiver_layers + layer) for layer in range(receiver_layers))


def depth_normalised(receiver_layers: int, sharer_layers: int) -> LayerMap:
    """The sharer layer at the nearest relative depth, ties to the lower one.

    Source: arXiv 2510.03215, A.1.1, argmin_j |i / (L_r − 1) − j / (L_s − 1)|.
    """

    def depth(layer: int, layers: int) -> float:
        return layer / (layers - 1) if layers > 1 else 0.0

    return tuple(
        min(range(sharer_layers), key=lambda j, i=i: abs(depth(i, receiver_layers) - depth(j, sharer_layers)))
        for i in range(receiver_layers)
    )


LAYER_MAPS: dict[str, Callable[[int, int], LayerMap]] = {
    "last-aligned": last_aligned,
    "depth-normalised": depth_normalised,
}
