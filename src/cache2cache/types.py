"""Values that cross module borders, and the legend of all shape letters.

Legend: B batch · N receiver positions · M sharer positions · P fused positions · L_r, L_s layers ·
H_r, H_s KV heads · D_r, D_s head dim · V vocabulary.
A cache tensor is (B, H, N, D), as transformers stores it. Keys and values of all layers together
are one tensor (2, L, B, H, N, D): index 0 holds the keys, index 1 the values.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, TypedDict

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from cache2cache.errors import ModelError

if TYPE_CHECKING:
    import numpy as np
    import torch


class Message(TypedDict):
    """One turn of a conversation."""

    role: str
    """`system`, `user` or `assistant`."""
    content: str


Conversation = Sequence[Message]

TEMPLATE_NAMES = ("plain", "completion")
"""Templates that any model can be given by name; `text/chat.py` has their Jinja text."""


def _check_template(template: str) -> str:
    if template not in TEMPLATE_NAMES and "{{" not in template and "{%" not in template:
        raise ValueError(f"{template!r} is no template; allowed: {', '.join(TEMPLATE_NAMES)}, Jinja text")
    return template


Template = Annotated[str, AfterValidator(_check_template)]
"""One of `TEMPLATE_NAMES`, or Jinja text."""

SharerPolicy = Literal["fail", "receiver-alone"]
"""When a sharer that runs as a service fails: the request fails with it, or the receiver answers without that sharer and
says so."""


@dataclass(frozen=True)
class Rendering:
    """One side's view of a conversation: the rendered text, its tokens, and where each message's content lies.

    Everything outside the content ranges is template: with n messages there are n + 1 template sections.
    """

    text: str
    ids: np.ndarray
    """(N,) int64 token ids."""
    starts: np.ndarray
    """(N,) int64, first character of each token in `text`."""
    ends: np.ndarray
    """(N,) int64, one past the last character of each token in `text`."""
    ranges: tuple[tuple[int, int], ...]
    """Character range of each message's content, without its outer white space, in message order."""


class Rope(BaseModel):
    """Rotary position embedding of one kind of layer: key dims [0, 2 * len(inv_freq)) are rotated in half-split pairs."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    inv_freq: tuple[float, ...]
    """Radians per position, one per pair of dims."""
    scaling: float = 1.0
    """Factor that the model puts on cosine and sine (YaRN's attention factor)."""


class Geometry(BaseModel):
    """What a fuser must know of a model: the sizes of its cache and how positions enter its keys."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    layers: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    vocab_size: int | None = Field(gt=0)
    max_positions: int | None
    """Longest context, None if the config does not say."""
    ropes: tuple[Rope, ...] = ()
    """The distinct rotary embeddings of the model."""
    rope_of_layer: tuple[int, ...] = ()
    """Index into `ropes` for each layer; empty if keys cannot be un-rotated, and then `rope_problem` says why."""
    rope_problem: str | None = None

    @model_validator(mode="after")
    def _every_layer_has_a_rope(self) -> Self:
        # The messages show none of the values: a remote sharer's may be as long as it likes.
        entries, kinds = len(self.rope_of_layer), len(self.ropes)
        if entries not in (0, self.layers):
            raise ValueError(f"rope_of_layer has {entries} entries, which is not one per layer")
        if not all(0 <= kind < kinds for kind in self.rope_of_layer):
            raise ValueError(f"rope_of_layer names ropes that are not there; there are {kinds}")
        return self

    @property
    def features(self) -> int:
        """Size of one position's keys (or values) in one layer, H * D."""
        return self.kv_heads * self.head_dim

    def only(self, layers: Sequence[int]) -> Geometry:
        """The model as if it had these layers alone, in this order."""
        ropes = tuple(self.rope_of_layer[layer] for layer in layers) if self.rope_of_layer else ()
        return self.model_copy(update={"layers": len(layers), "rope_of_layer": ropes})


class ModelCard(BaseModel):
    """Identity of one model of a pair, as a fuser remembers it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    id: str
    """Catalogue name, hub id, or the last part of a folder's name."""
    revision: str | None = None
    geometry: Geometry
    tokenizer: str | None = None
    """Fingerprint of the tokenizer; None in converted checkpoints, whose makers recorded none."""


@dataclass(frozen=True)
class Span:
    """A run of receiver positions that are prefilled together and then either fused or left as they are."""

    start: int
    stop: int
    fuse: bool = True


@dataclass
class Timings:
    """Seconds spent in each stage of one request (or one batch of requests)."""

    tokenise: float = 0.0
    align: float = 0.0
    sharer_prefill: float = 0.0
    receiver_prefill: float = 0.0
    fuse: float = 0.0
    decode: float = 0.0

    @property
    def total(self) -> float:
        return sum(vars(self).values())


@contextmanager
def clock(timings: Timings, stage: str, device: torch.device | None = None) -> Iterator[None]:
    """Add the time that a block takes to a stage, work queued on an accelerator included."""
    start = time.perf_counter()
    try:
        yield
    finally:
        if device is not None and device.type != "cpu":
            import torch

            torch.accelerator.synchronize(device)
        setattr(timings, stage, getattr(timings, stage) + time.perf_counter() - start)


@dataclass(frozen=True)
class TokenCounts:
    """Tokens that each model read and that the receiver wrote, one conversation."""

    receiver_prompt: int
    sharer_prompt: tuple[int, ...]
    """One count per sharer that spoke."""
    generated: int


@dataclass(frozen=True)
class Generation:
    """One answer."""

    text: str
    ids: list[int]
    """Generated token ids, without padding, with the end-of-sequence token if there was one."""
    counts: TokenCounts
    timings: Timings
    """Shared by all answers of a batch: the batch is computed together."""
    raw: Any = field(default=None, repr=False)
    """What `transformers.generate` returned for the batch."""
    degraded: Mapping[int, str] = field(default_factory=dict)
    """Sharers that should have spoken and could not, and why; always empty under the policy "fail"."""


def torch_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` by name.

    Raises:
        ModelError: any other name.
    """
    import torch

    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ModelError("unknown dtype", got=name, allowed="auto, float32, bfloat16, float16")
    return dtype
