"""A frozen language model, its tokenizer and its identity, loaded and checked."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from cache2cache.errors import C2CError, DownloadError, ModelError
from cache2cache.models import kv
from cache2cache.models.geometry import geometry
from cache2cache.models.pull import Source, resolve
from cache2cache.types import ModelCard

_PROBE_TEXT = "Caches speak: 2+2=4, naïve café — 缓存到缓存 🚀\n\tdef f(x):  return x"


class Sharer(Protocol):
    """What a pair asks of a model that it listens to, whose weights need not be here: see `serve/remote.py`."""

    tokenizer: PreTrainedTokenizerBase
    card: ModelCard

    @property
    def device(self) -> torch.device: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def prefill(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        needed: torch.Tensor,
        layers: Sequence[int],
    ) -> DynamicCache:
        """Read a batch; what is needed of it can be gathered from the cache that is returned.

        Args:
            ids: (B, M), padded on the left.
            mask: (B, M), 1 for real tokens.
            cache: what was read of these rows before; extended in place by whoever keeps caches here.
            needed: (B, M) bool, positions that will be fused.
            layers: layers that will be fused.
        """
        ...


@dataclass
class LanguageModel:
    """One frozen model of a pair. Knows nothing of fusers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    card: ModelCard

    @classmethod
    def wrap(
        cls,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str | None = None,
        revision: str | None = None,
    ) -> LanguageModel:
        """Take a model that is loaded already, freeze it and check that it can take part.

        Raises:
            ModelError: no per-token KV cache, no fast tokenizer, or weights that are not finite.
        """
        name = name or Path(model.config.name_or_path or "").name or type(model).__name__
        if not getattr(tokenizer, "is_fast", False):
            raise ModelError(
                f"{name} has no fast tokenizer, so its tokens cannot be traced to characters",
                got=type(tokenizer).__name__,
                hint="Convert it to a tokenizer.json first",
            )
        card = ModelCard(
            id=name, revision=revision, geometry=geometry(model.config, name), tokenizer=fingerprint(tokenizer)
        )
        model.eval().requires_grad_(False)
        lm = cls(model, tokenizer, card)
        lm._probe()
        return lm

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    def prefill(
        self,
        ids: torch.Tensor,
        mask: torch.Tensor,
        cache: DynamicCache,
        needed: torch.Tensor,
        layers: Sequence[int],
    ) -> DynamicCache:
        """Read what the cache does not hold yet, whole, whatever is needed of it. See `Sharer`."""
        return kv.prefill(self.model, ids[:, kv.length(cache) :].to(self.device), mask.to(self.device), cache)

    def release(self) -> None:
        """Give the memory of the weights back. From then on nothing can be read; tokenizer and card stay."""
        self.model.to("meta")  # type: ignore[arg-type]

    def _probe(self) -> None:
        """Read one token and look at the cache, since configs do not tell what a model really keeps."""
        size = self.card.geometry
        ids = torch.zeros((1, 1), dtype=torch.long, device=self.device)
        try:
            cache = kv.prefill(self.model, ids, torch.ones_like(ids))
        except (TypeError, AttributeError, IndexError, ValueError) as error:
            raise ModelError(
                f"{self.card.id} cannot read a prompt into a KV cache", got=f"{type(error).__name__}: {error}",
                allowed="decoders that accept past_key_values=DynamicCache()",
            ) from error  # fmt: skip
        kv.check(cache, size.layers, size.kv_heads, size.head_dim, 1, self.card.id)
        if not kv.stack(cache).isfinite().all():
            raise ModelError(
                f"{self.card.id} computes keys or values that are not finite",
                hint="Its weights hold NaN or infinity: fetch them again, or load it in float32",
            )


def pad_id(lm: Sharer) -> int:
    """A token to pad with: the tokenizer's, or its end of sequence."""
    tokenizer = lm.tokenizer
    return next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id) if i is not None), 0)  # type: ignore[return-value]


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """What a tokenizer does, in 16 hex digits: its vocabulary and how it splits a text of many scripts."""
    behaviour = [
        sorted(tokenizer.get_vocab().items()),
        sorted(tokenizer.all_special_ids),
        tokenizer(_PROBE_TEXT, add_special_tokens=False)["input_ids"],
    ]
    return hashlib.sha256(json.dumps(behaviour).encode()).hexdigest()[:16]


def weights_fingerprint(model: PreTrainedModel) -> str:
    """What a model computes with, in 16 hex digits: samples of every weight, of which any training changes some."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        flat = weight.detach().flatten()
        digest.update(name.encode())
        digest.update(flat[:: max(1, len(flat) // 64)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def load(
    name: str | Path,
    *,
    revision: str | None = None,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "auto",
    trust_remote_code: bool = False,
) -> LanguageModel:
    """Load a model by catalogue name, hub id or folder.

    Args:
        name: `org/name@revision` also pins a hub id.
        revision: branch, tag or commit of a hub id.
        dtype: a torch dtype or its name; "auto" is the one the weights are stored in.
        trust_remote_code: run code that comes with a hub model. Off by default.

    Raises:
        UnknownModelError, DownloadError: see `cache2cache.models.pull.resolve`.
        ModelError: the files are damaged or the model cannot take part.
    """
    source, revision = _source(name, revision)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(dtype, str) and dtype != "auto":
        dtype = torch_dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        model = AutoModelForCausalLM.from_pretrained(source.location, dtype=dtype, **options)
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {name} are damaged", got=str(error), hint=f"Delete {source.location} and fetch it again"
        ) from error
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise unreadable(f"{name} could not be loaded", source.location, error) from error
    return LanguageModel.wrap(model.to(device), tokenizer, name=source.name, revision=revision)  # type: ignore[arg-type]


def unreadable(what: str, location: str | Path, error: Exception) -> C2CError:
    """What to raise for a model that transformers cannot read: of a hub id it may be that it could not be fetched."""
    got = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and not Path(location).exists():
        return DownloadError(what, got=got, hint="Check the name, the network and what you may read on the hub")
    return ModelError(what, got=got)


def _source(name: str | Path, revision: str | None) -> tuple[Source, str | None]:
    if revision is None and "@" in str(name) and not Path(name).exists():
        name, _, revision = str(name).rpartition("@")
    return resolve(str(name)), revision


def check_device(name: str, hint: str = "c2c doctor lists the devices") -> None:
    """Raise ModelError if torch has no such device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"no device {name} here", got=str(error).splitlines()[0], hint=hint) from error


def torch_dtype(name: str) -> torch.dtype:
    """`float32`, `bfloat16` or `float16` by name.

    Raises:
        ModelError: any other name.
    """
    dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}.get(name)
    if dtype is None:
        raise ModelError("unknown dtype", got=name, allowed="auto, float32, bfloat16, float16")
    return dtype
