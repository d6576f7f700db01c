"""What every fuser is: a config that names its pair, gates, and a delta to add to the receiver's cache."""

from __future__ import annotations

import os
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from torch import nn

from cache2cache import __version__
from cache2cache.errors import FuserFormatError, FuserMismatchError
from cache2cache.fuser.gate import Gate, GateConfig
from cache2cache.fuser.layers import pick
from cache2cache.fuser.strict import in_words
from cache2cache.types import Geometry, ModelCard, Template

KINDS = {"paper": "cache2cache.fuser.paper:PaperFuser", "compact": "cache2cache.fuser.compact:CompactFuser"}
"""Kind → where it lives; imported on use."""

FORMAT_VERSION = 1

_OTHER_TOKENIZER = "another tokenizer"


class FuserConfig(BaseModel):
    """Everything that rebuilds a fuser except its weights, and everything that its pair must match."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = FORMAT_VERSION
    package_version: str = __version__
    kind: str
    receiver: ModelCard
    sharer: ModelCard
    layer_map: tuple[int, ...]
    """Sharer layer of each receiver layer."""
    alignment: Literal["native", "retokenise-first", "retokenise-longest", "same-ids"] = "native"
    """`native`: each side tokenises its own rendering. `retokenise-*`: the published fusers' way.
    `same-ids`: the sharer reads the receiver's token ids."""
    receiver_template: Template | None = None
    """Template that the receiver's side renders with: a name or Jinja text; None is the model's own."""
    sharer_template: Template | None = None
    fuse_last: int | None = Field(default=None, gt=0)
    """Fuse only this many positions at the end of each prompt; None fuses all."""
    sizes: dict[str, Any] = {}
    """Sizes of the kind, see its `Sizes`."""
    gate: GateConfig = GateConfig()
    training: dict[str, Any] = {}
    """Summary of the training run: data, steps, seed, results."""

    @model_validator(mode="after")
    def _consistent(self) -> FuserConfig:
        if self.kind not in KINDS:
            raise ValueError(f"kind {self.kind!r} is unknown; allowed: {', '.join(KINDS)}")
        layers, deepest = self.receiver.geometry.layers, self.sharer.geometry.layers - 1
        if len(self.layer_map) != layers:
            raise ValueError(f"layer_map has {len(self.layer_map)} entries for {layers} receiver layers")
        if not all(0 <= layer <= deepest for layer in self.layer_map):
            raise ValueError(f"layer_map {list(self.layer_map)} leaves the sharer's layers 0–{deepest}")
        if not all(0 <= layer < layers for layer in self.gate.layers or ()):
            raise ValueError(f"gate.layers {list(self.gate.layers or ())} leaves the receiver's layers 0–{layers - 1}")
        return self


class Delta(NamedTuple):
    """What a fuser adds to the receiver's cache."""

    entries: torch.Tensor
    """(E,) kind · L_r + layer; closed gates are absent."""
    value: torch.Tensor
    """(E, B, H_r, P, D_r) float"""


class Fuser(nn.Module):
    """All layer fusers of one ordered pair. Knows tensors and positions, not models or text."""

    Sizes: ClassVar[type[BaseModel]]

    def __init__(self, config: FuserConfig):
        super().__init__()
        self.config = config
        self.gate = Gate(config.gate, config.receiver.geometry.layers)
        try:
            self.sizes = self.Sizes.model_validate(config.sizes)
        except ValidationError as error:
            raise FuserFormatError(f"sizes of a {config.kind} fuser are wrong", got=in_words(error)) from error

    @staticmethod
    def from_config(config: FuserConfig) -> Fuser:
        """A fresh fuser of the config's kind."""
        return kind_class(config.kind)(config)

    @staticmethod
    def from_pretrained(
        location: str | os.PathLike[str], *, revision: str | None = None, dtype: str | torch.dtype = torch.float32
    ) -> Fuser:
        """Load a fuser: our format or a published checkpoint.

        Args:
            location: `demo` or `general` (which ship with the package), a folder, a hub id `org/repo`, or
                `org/repo/folder` for a repository that holds several. A `Path` is always a folder.
            revision: branch, tag or commit of a hub id; nothing else has any.
            dtype: of the weights in memory, or its name; "auto" is the one they are stored in. Inputs are converted to
                it and outputs back.

        Raises:
            FuserFormatError: not a fuser, damaged, of an unknown layout, or with weights that are not finite.
            DownloadError: the hub did not answer.
            ModelError: no dtype of this name.
        """
        from cache2cache.fuser.store import load_fuser

        return load_fuser(location, revision=revision, dtype=dtype)

    def save_pretrained(self, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
        """Write `fuser.safetensors` and `fuser_config.json`.

        Args:
            dtype: of the weights on disk; as they are by default.
        """
        from cache2cache.fuser.store import save_fuser

        return save_fuser(self, folder, dtype=dtype)

    def push_to_hub(self, repo_id: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
        """Upload to a hub repository, made if it is not there. Returns the commit's address."""
        from cache2cache.fuser.store import push_fuser

        return push_fuser(self, repo_id, private=private, dtype=dtype)

    def check_pair(self, receiver: ModelCard, sharer: ModelCard) -> None:
        """Raise FuserMismatchError unless sizes, rotary parameters and tokenizers are those of the pair that the fuser was
        trained for. Other weights of the same form are not noticed; `verify` compares the names at least.
        """
        wrong = _differences("receiver", self.config.receiver, receiver) + _differences(
            "sharer", self.config.sharer, sharer
        )
        if not wrong:
            return
        swapped = not (
            _differences("receiver", self.config.receiver, sharer)
            or _differences("sharer", self.config.sharer, receiver)
        )
        hint = "Use the pair that it was trained for, or train one for yours"
        if swapped:
            hint = "Receiver and sharer are swapped"
        elif all(fault.endswith(_OTHER_TOKENIZER) for fault in wrong):
            hint = (
                "If special tokens were changed (pad_token = eos_token), leave them as they are: prompts are padded here. "
                "If it really is another, use the pair that the fuser was trained for"
            )
        raise FuserMismatchError(
            "the fuser does not fit the pair",
            got=f"{receiver.id} ← {sharer.id} ({'; '.join(wrong)})",
            allowed=f"{self.config.receiver.id} ← {self.config.sharer.id}",
            hint=hint,
        )

    def speaks(self) -> bool:
        """False if every gate is closed for good, so that nothing needs to be computed."""
        return self.training or bool((self.gate.logit > 0).any())

    def delta(
        self,
        own: torch.Tensor,
        other: torch.Tensor,
        own_positions: torch.Tensor,
        other_positions: torch.Tensor,
        heard: torch.Tensor | None = None,
    ) -> Delta:
        """gate · weight · projection, for all entries whose gate may be open.

        Args:
            own: (2, L_r, B, H_r, P, D_r) the receiver's clean cache at the fused positions.
            other: (2, L_r, B, H_s, P, D_s) the sharer's, at the aligned positions, one layer per receiver layer.
            own_positions: (B, P) position ids that the receiver's keys were rotated by.
            other_positions: (B, P) those of the sharer's.
            heard: (B, P) bool, the delta is zero elsewhere; everywhere true by default.
        """
        if self.training and self.config.gate.learned:
            entries, subset = torch.arange(own.shape[0] * own.shape[1], device=own.device), None
        else:
            entries = self.gate.open()
            subset = None if len(entries) == own.shape[0] * own.shape[1] else entries
        if len(entries) == 0:
            return Delta(entries, own.new_zeros((0, *own.shape[2:])))
        own, other = (pick(x, subset) for x in (own, other))
        weight, projection = self.project(own, other, own_positions, other_positions, entries, subset)
        # Everything that is one number per head comes before the product: the projections are the large tensors.
        weight = weight.float()
        if self.training and self.config.gate.learned:
            noise = torch.rand((*projection.shape[:-1], 1), device=projection.device, dtype=self.dtype)
            weight = weight * self.gate.sample(noise)
        if heard is not None:
            weight = weight * heard[None, :, None, :, None]
        return Delta(entries, weight * projection.float())

    def project(
        self,
        own: torch.Tensor,
        other: torch.Tensor,
        own_positions: torch.Tensor,
        other_positions: torch.Tensor,
        entries: torch.Tensor,
        subset: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Weight (E, B, H_r, P, 1) and projection (E, B, H_r, P, D_r), for the entries given.

        Args:
            own: (E, B, H_r, P, D_r), in the receiver's dtype.
            other: (E, B, H_s, P, D_s), in the sharer's.
            entries: (E,) which entries these are.
            subset: the same, or None when they are all.
        """
        raise NotImplementedError

    @property
    def dtype(self) -> torch.dtype:
        return self.gate.logit.dtype

    def parameter_count(self) -> int:
        return sum(p.numel() for p in self.parameters())


def kind_class(kind: str) -> type[Fuser]:
    """The class of a kind, one of `KINDS`."""
    module, name = KINDS[kind].split(":")
    return getattr(import_module(module), name)


def _differences(side: str, expected: ModelCard, got: ModelCard) -> list[str]:
    """What keeps a model from being the one that the fuser knows, in words."""
    wrong = []
    for field in ("layers", "kv_heads", "head_dim", "vocab_size"):
        want, have = getattr(expected.geometry, field), getattr(got.geometry, field)
        if want is not None and want != have:
            wrong.append(f"{side}: {field} {have} instead of {want}")
    if not _same_ropes(expected.geometry, got.geometry):
        wrong.append(f"{side}: other rotary parameters")
    if expected.tokenizer is not None and expected.tokenizer != got.tokenizer:
        wrong.append(f"{side}: {_OTHER_TOKENIZER}")
    return wrong


def _same_ropes(expected: Geometry, got: Geometry) -> bool:
    if not expected.ropes:  # nothing recorded: kinds that do not rotate, converted checkpoints
        return True
    return expected.rope_of_layer == got.rope_of_layer and all(
        len(a.inv_freq) == len(b.inv_freq)
        and torch.allclose(torch.tensor(a.inv_freq), torch.tensor(b.inv_freq), rtol=1e-5)
        and abs(a.scaling - b.scaling) < 1e-5
        for a, b in ((expected.ropes[kind], got.ropes[kind]) for kind in set(expected.rope_of_layer))
    )
