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
from cache2cache.models.pull import resolve, split_revision
from cache2cache.types import Geometry, ModelCard, torch_dtype

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
        model.eval().requires_grad_(False)
        size = _probed(model, geometry(model.config, name), name)
        card = ModelCard(id=name, revision=revision, geometry=size, tokenizer=fingerprint(tokenizer))
        return cls(model, tokenizer, card)

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


def _probed(model: PreTrainedModel, size: Geometry, name: str) -> Geometry:
    """Read one token and look at the cache, since configs do not tell what a model really keeps.

    Returns:
        The config's geometry with the cache's heads: multi-query models may keep fewer than their config says.
    """
    ids = torch.zeros((1, 1), dtype=torch.long, device=model.device)
    try:
        cache = kv.prefill(model, ids, torch.ones_like(ids))
    except (TypeError, AttributeError, IndexError, ValueError) as error:
        raise ModelError(
            f"{name} cannot read a prompt into a KV cache", got=f"{type(error).__name__}: {error}",
            allowed="decoders that accept past_key_values=DynamicCache()",
        ) from error  # fmt: skip
    size = size.model_copy(update={"kv_heads": kv.heads(cache) or size.kv_heads})
    kv.check(cache, size.layers, size.kv_heads, size.head_dim, 1, name)
    if not kv.stack(cache).isfinite().all():
        raise ModelError(
            f"{name} computes keys or values that are not finite",
            hint="Its weights hold NaN or infinity: fetch them again, or load it in float32",
        )
    return size


def pad_id(lm: Sharer) -> int:
    """A token to pad with: the tokenizer's, or its end of sequence, if the model has an embedding for it."""
    candidates, size = (lm.tokenizer.pad_token_id, lm.tokenizer.eos_token_id), lm.card.geometry.vocab_size
    return next((i for i in candidates if i is not None and not (size and i >= size)), 0)  # type: ignore[operator, return-value]


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
        revision: branch, tag or commit of a hub id; nothing else has any.
        dtype: a torch dtype or its name; "auto" is the one the weights are stored in.
        trust_remote_code: run code that comes with a hub model. Off by default.

    Raises:
        UnknownModelError, DownloadError: see `cache2cache.models.pull.resolve`.
        ModelError: the files are damaged or incomplete, or the model cannot take part.
    """
    name, revision = split_revision(str(name), revision)
    source = resolve(name)
    options: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    if isinstance(dtype, str) and dtype != "auto":
        dtype = torch_dtype(dtype)
    try:
        tokenizer = AutoTokenizer.from_pretrained(source.location, **options)
        # Weights of other shapes are "ignored" into the report, which names them as it names those that are missing.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source.location, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True, **options
        )
    except SafetensorError as error:
        raise ModelError(
            f"the weights of {name} are damaged", got=str(error), hint=f"Delete {source.location} and fetch it again"
        ) from error
    except Exception as error:  # damaged files fail in any way that the code which reads them can
        raise unreadable(f"{name} could not be loaded", source.location, error) from error
    model, report = loaded
    _check_complete(model, report, source.location)
    return LanguageModel.wrap(model.to(device), tokenizer, name=source.name, revision=revision)


def _check_complete(model: PreTrainedModel, report: dict[str, Any], location: str) -> None:
    """Raise ModelError unless every weight was read; transformers leaves the others random and only warns of it.

    Nor may one be left over of a part that the model has, such as a layer too many. Whole parts that it has not, such as a
    picture encoder, and what its class says is to be ignored, do not change what it computes.
    """
    faults = [f"{name} is missing" for name in sorted(report["missing_keys"])]
    for name, stored, expected in sorted(report["mismatched_keys"]):
        faults.append(f"{name} has shape {tuple(stored)} instead of {tuple(expected)}")
    faults += [f"{name} has no place" for name in sorted(report["unexpected_keys"]) if _belongs(model, name)]
    faults += report["error_msgs"]
    if faults:
        raise ModelError(
            f"the weights in {location} are not those that its config promises",
            got=f"{len(faults)} wrong: {'; '.join(faults[:3])}" + ("; …" if len(faults) > 3 else ""),
            hint="Fetch or save the model again, or correct its config.json",
        )


def _belongs(model: PreTrainedModel, name: str) -> bool:
    """Whether a weight lies in a part of the model, that is below the model itself and its decoder as a whole."""
    module: torch.nn.Module = model
    for part in name.split(".")[:-1]:
        child = getattr(module, part, None)
        if not isinstance(child, torch.nn.Module):
            break
        module = child
    return module is not model and module is not model.base_model


def unreadable(what: str, location: str | Path, error: Exception) -> C2CError:
    """What to raise for a model that transformers cannot read: of a hub id it may be that it could not be fetched."""
    got = f"{type(error).__name__}: {error}"
    if isinstance(error, OSError) and not Path(location).exists():
        return DownloadError(what, got=got, hint="Check the name, the network and what you may read on the hub")
    return ModelError(what, got=got)


def check_device(name: str, hint: str = "c2c doctor lists the devices") -> None:
    """Raise ModelError if torch has no such device here."""
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ModelError(f"no device {name} here", got=str(error).splitlines()[0], hint=hint) from error
