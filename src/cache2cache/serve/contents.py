"""What a payload's envelope holds: a header that describes a cache, and a body with the cache's numbers.

Reading trusts nothing: all sizes follow from the header, are bounded before anything is allocated, and must be those of
the body.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, deserialize

from cache2cache.errors import PayloadError
from cache2cache.serve import envelope
from cache2cache.serve.quantise import Integer, layout
from cache2cache.types import ModelCard

FLOATS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
"""What a cache may be in, by name."""

_STORED_AS = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16",
    torch.int64: "I64", torch.int8: "I8", torch.uint8: "U8",
}  # fmt: skip
"""safetensors' names."""

_MAX_BODY_HEADER_BYTES = 1 << 12
_MAX_SIZE = 1 << 31
"""No length or size of a model reaches it; products of numbers below it stay small numbers."""


class Header(BaseModel):
    """Everything about a cache but its numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    model: ModelCard
    ids_digest: str
    length: int = Field(gt=0, lt=_MAX_SIZE)
    held: int = Field(gt=0, lt=_MAX_SIZE)
    """P, number of positions in the body."""
    layers: tuple[int, ...] = Field(min_length=1)
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of the cache."""
    quantised: Integer | None
    compressed: bool
    body_bytes: int = Field(gt=0, lt=_MAX_SIZE**2)
    """Size of the body before compression."""

    def kv_shape(self) -> tuple[int, int, int, int, int]:
        """(2, U, H, P, D)"""
        size = self.model.geometry
        return 2, len(self.layers), size.kv_heads, self.held, size.head_dim

    def kv_bytes(self) -> int:
        """Size of the cache in memory."""
        return math.prod(self.kv_shape()) * FLOATS[self.dtype].itemsize

    def tensors(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtype and shape of everything that the body holds."""
        shape = self.kv_shape()
        kv = layout(shape, self.quantised) if self.quantised else {"kv": (FLOATS[self.dtype], shape)}
        return {"positions": (torch.int64, (self.held,)), **kv}


def check_geometry(model: ModelCard) -> None:
    """Raise PayloadError unless the sizes of the model's cache are sizes."""
    for name in ("layers", "kv_heads", "head_dim"):
        if not 0 < getattr(model.geometry, name) < _MAX_SIZE:
            raise PayloadError(f"no model has such a geometry: {name} is out of range", allowed=f"1–{_MAX_SIZE - 1}")


def read_header(raw: bytes) -> Header:
    """The header, with every field and size within its range.

    Raises:
        PayloadError: not JSON, a field that is missing, unknown, of another type or out of range.
    """
    try:
        header = Header.model_validate_json(raw, strict=True)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))[:80]  # may be the sender's words
        raise PayloadError("the payload's header is malformed", got=f"{where!r}: {fault['msg']}") from error
    check_geometry(header.model)
    return header


def read_body(body: memoryview, header: Header) -> dict[str, torch.Tensor]:
    """The body's tensors, which are exactly those that the header promises.

    Raises:
        PayloadError: other tensors, another size, not safetensors, not zstd.
        MissingExtraError: it is compressed, and zstandard is not installed.
    """
    expected = header.tensors()
    least = sum(math.prod(shape) * dtype.itemsize for dtype, shape in expected.values())
    if not least < header.body_bytes <= least + _MAX_BODY_HEADER_BYTES:
        raise PayloadError(
            "the payload's body cannot have the size that its header says",
            got=f"{header.body_bytes:,} bytes", allowed=f"{least:,} and its own header",
        )  # fmt: skip
    if header.compressed:
        plain = envelope.decompress(body, header.body_bytes)
    elif len(body) == header.body_bytes:
        plain = bytes(body)
    else:
        raise PayloadError(
            "the payload's body has another size than its header says",
            got=f"{len(body):,} bytes", allowed=f"{header.body_bytes:,}",
        )  # fmt: skip
    try:
        stored = dict(deserialize(plain))
    except SafetensorError as error:
        raise PayloadError("the payload's body is not safetensors", got=str(error)) from error
    forms = {name: (part["dtype"], tuple(part["shape"])) for name, part in stored.items()}
    promised = {name: (_STORED_AS[dtype], shape) for name, (dtype, shape) in expected.items()}
    if forms != promised:
        raise PayloadError("the payload's tensors are not those of its header", got=forms, allowed=promised)
    tensors = {
        name: torch.frombuffer(stored[name]["data"], dtype=dtype).view(shape)
        for name, (dtype, shape) in expected.items()
    }
    if header.quantised and not (tensors["scales"] > 0).all():
        raise PayloadError("the payload has scales that are not positive")
    return tensors
