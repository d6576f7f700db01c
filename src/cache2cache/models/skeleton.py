"""Models without their weights: what a pair weighs and how long its layers take, known before anything is fetched."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, models, pre_tokenizers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from cache2cache.models.catalogue import Model
from cache2cache.models.geometry import geometry
from cache2cache.models.load import LanguageModel, fingerprint, unreadable
from cache2cache.models.pull import look_up, ready, split_revision
from cache2cache.types import ModelCard, torch_dtype


@dataclass(frozen=True)
class Skeleton:
    """A model of which only the config and the tokenizer were read."""

    lm: LanguageModel
    """Its model lies on the meta device: shapes without numbers. It renders and tokenises as the real one."""
    to_fetch: Model | None
    """The catalogue's entry if nothing of the model is here; then its tokenizer is a stand-in that splits about as finely."""

    @property
    def weights(self) -> int:
        """Bytes of all weights, tied ones once."""
        return sum(p.numel() * p.element_size() for p in self.lm.model.parameters())


def skeleton(name: str, *, dtype: str = "auto", trust_remote_code: bool = False) -> Skeleton:
    """Read a model's config and tokenizer. Of a hub id only those are fetched, of the registry's models nothing is.

    Args:
        name: as for `load`.
        dtype: `float32`, `bfloat16`, `float16`, or "auto", the one the weights are stored in.

    Raises:
        UnknownModelError: see `look_up`.
        DownloadError: config or tokenizer of a hub id could not be fetched.
        ModelError: no config or tokenizer can be read, or the config is of no model that can take part.
    """
    name, revision = split_revision(name)
    found = look_up(name)
    if isinstance(found, Model) and found.weights is not None:
        location, label = ready(found), found.name
    else:
        location = found.hub_id if isinstance(found, Model) else str(found)
        label = found.name if isinstance(found, Path) else location
    if location is None:
        assert isinstance(found, Model) and found.config is not None, (
            "registry models have their config in the catalogue"
        )
        config, tokenizer, to_fetch = AutoConfig.for_model(**found.config), stand_in_tokenizer(), found
    else:
        config, tokenizer = _read(str(location), label, revision=revision, trust_remote_code=trust_remote_code)
        to_fetch = None
    stored = getattr(config, "dtype", None) or torch.float32
    weights = torch_dtype(dtype) if dtype != "auto" else stored
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=weights, trust_remote_code=trust_remote_code)
    except Exception as error:  # a config that cannot be fails wherever its sizes are used
        raise unreadable(f"the config of {label} is that of no model", location or label, error) from error
    card = ModelCard(id=label, revision=revision, geometry=geometry(config, label), tokenizer=fingerprint(tokenizer))
    return Skeleton(LanguageModel(model.eval().requires_grad_(False), tokenizer, card), to_fetch)


def layer_weights(lm: LanguageModel) -> list[torch.Tensor]:
    """The weights that every token passes: all but embedding and output head."""
    embedding = lm.model.get_input_embeddings().weight
    return [weight for weight in lm.model.get_decoder().parameters() if weight is not embedding]


def head_weight(lm: LanguageModel) -> torch.Tensor:
    """(V, hidden) of the output head."""
    head: Any = lm.model.get_output_embeddings()
    return head.weight


def _read(location: str, name: str, **options: Any) -> tuple[PretrainedConfig, PreTrainedTokenizerBase]:
    try:
        config = AutoConfig.from_pretrained(location, **options)
        tokenizer = AutoTokenizer.from_pretrained(location, **options)
    except Exception as error:  # damaged files fail in any way that the code which reads them can
        raise unreadable(f"config and tokenizer of {name} could not be read", location, error) from error
    return config, tokenizer


def shallow(lm: LanguageModel, layers: int, device: torch.device, *, vocabulary: bool = True) -> LanguageModel:
    """The first layers of a model, in real memory, with the same number for every weight.

    What it computes means nothing. How long it takes and what it keeps do not depend on the numbers.

    Args:
        vocabulary: with embedding and output head of full size, or of 8 tokens.
    """
    config = copy.deepcopy(lm.model.config)
    text = config.get_text_config(decoder=True)
    whole = text.num_hidden_layers
    for key, value in vars(text).items():
        if isinstance(value, list | tuple) and len(value) == whole:  # one entry per layer, such as layer_types
            setattr(text, key, value[:layers])
    text.num_hidden_layers = layers
    if not vocabulary:
        text.vocab_size, text.pad_token_id = 8, 0
    with torch.device("meta"):
        model = type(lm.model)._from_config(config, dtype=lm.dtype)  # type: ignore[attr-defined]
    model = _filled(model, device)
    return LanguageModel(model, lm.tokenizer, lm.card.model_copy(update={"geometry": geometry(config, lm.card.id)}))


@torch.no_grad()
def _filled(model: PreTrainedModel, device: torch.device) -> PreTrainedModel:
    # Buffers hold rotary frequencies that only the constructor knows: those of a model without weights to speak of
    # would do, but on the meta device there are none, so they are filled as well.
    model = model.to_empty(device=device).eval().requires_grad_(False)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.fill_(0.01)
    return model


_PIECES = r" ?\p{L}{1,8}| ?\p{N}| ?[^\s\p{L}\p{N}]{1,3}\n?|\s+"
"""Within 3 % of the catalogue's tokenizers on English questions and chats."""


def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """Splits text into pieces about as long as a language model's tokens. The tokens mean nothing."""
    backend = Tokenizer(models.WordLevel({"<piece>": 0, "<end>": 1}, unk_token="<piece>"))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(_PIECES), behavior="isolated")
    backend.add_special_tokens([AddedToken("<end>", special=True, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<end>",
        pad_token="<end>",
        chat_template=(
            "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        ),
    )
