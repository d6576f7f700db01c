"""What `transformers.generate` is asked for behind a cache that holds the prompt already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from cache2cache import inputs
from cache2cache.errors import GenerationError
from cache2cache.models.load import LanguageModel, pad_id

DEFAULT_NEW_TOKENS = 256
"""Asked for when neither max_new_tokens nor max_length is given, as far as the context has room."""

REFUSED_OPTIONS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""With these, transformers 5.19 ignores that a cache holds the prompt already."""

CACHED: Mapping[str, Any] = MappingProxyType({**dict.fromkeys(REFUSED_OPTIONS), "use_cache": True})
"""The same for a model's own defaults, which nobody asked for and which only decide how fast it writes."""


def generation_options(lm: LanguageModel, prompt: int, kwargs: dict[str, Any]) -> tuple[dict[str, Any], int]:
    """`generate`'s arguments completed, and how many rows it makes of each.

    Raises:
        ContextLengthError: prompt and max_new_tokens are longer than the context.
        GenerationError: an option with which transformers reads the prompt a second time, behind the cached one; or nothing to
            be written.
    """
    options = dict(kwargs)
    given = options.get("generation_config")
    config = given or lm.model.generation_config

    def asked(name: str) -> Any:
        return options.get(name, getattr(given, name, None))

    def chosen(name: str) -> Any:
        return options.get(name, getattr(config, name, None))

    refused = [name for name in REFUSED_OPTIONS if asked(name) is not None]
    if asked("use_cache") is False:
        refused.append("use_cache = False")
    if refused:
        raise GenerationError("transformers would read the prompt twice", got=", ".join(refused), hint="Leave it out")
    options |= CACHED
    if chosen("max_new_tokens") is not None and chosen("max_new_tokens") < 1:
        raise GenerationError(
            "nothing is to be written", got=f"max_new_tokens {chosen('max_new_tokens')}", allowed="1 or more"
        )
    if chosen("max_new_tokens") is None and asked("max_length") is None:
        room = (lm.card.geometry.max_positions or prompt + DEFAULT_NEW_TOKENS) - prompt
        options["max_new_tokens"] = max(1, min(DEFAULT_NEW_TOKENS, room))
    if chosen("pad_token_id") is None:
        options["pad_token_id"] = pad_id(lm)
    if chosen("stop_strings"):
        options.setdefault("tokenizer", lm.tokenizer)
    options.setdefault("eos_token_id", chosen("eos_token_id"))
    inputs.check_length(lm, prompt, chosen("max_new_tokens") or max(asked("max_length") - prompt, 0))
    return options, max(chosen("num_beams") or 1, chosen("num_return_sequences") or 1)


def until_end(ids: list[int], end: int | Sequence[int] | None) -> list[int]:
    """An answer's tokens up to its first end token, which stays."""
    ends = {end} if isinstance(end, int) else set(end or ())
    return next((ids[: i + 1] for i, token in enumerate(ids) if token in ends), ids)


def end_tokens(lm: LanguageModel) -> frozenset[int]:
    """Tokens that end a model's turn."""
    end = lm.model.generation_config.eos_token_id  # type: ignore[union-attr]
    return frozenset({end} if isinstance(end, int) else end or ())
