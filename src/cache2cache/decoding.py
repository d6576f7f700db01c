"""What `transformers.generate` is asked for behind a cache that holds the prompt already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from cache2cache import inputs
from cache2cache.errors import GenerationError
from cache2cache.models.load import LanguageModel, pad_id

DEFAULT_NEW_TOKENS = 256
"""Asked for when neither max_new_tokens nor max_length is given, as far as the context has room."""

REFUSED_OPTIONS = ("assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "prefill_chunk_size")
"""With these, transformers 5.19 ignores that a cache holds the prompt already."""

CACHED: Mapping[str, Any] = MappingProxyType({**dict.fromkeys(REFUSED_OPTIONS), "use_cache": True})
"""The same for a model's own defaults, which nobody asked for and which only decide how fast it writes."""


class Ended(StoppingCriteria):
    """Stopping criteria, and how long each row was when they ended it: what follows in a row is padding."""

    def __init__(self, criteria: StoppingCriteriaList):
        self._criteria = criteria
        self._at: torch.Tensor | None = None
        """(rows,), 0 for those that go on."""

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        done = self._criteria(input_ids, scores, **kwargs)  # type: ignore[arg-type]
        if self._at is None:
            self._at = torch.zeros(len(input_ids), dtype=torch.long, device=input_ids.device)
        self._at[done & (self._at == 0)] = input_ids.shape[1]
        return done

    def length(self, row: int) -> int | None:
        """Of prompt and answer, if the criteria ended this row."""
        return None if self._at is None else int(self._at[row]) or None


@dataclass(frozen=True)
class Decoding:
    """What `generate` is asked for, and how what it gives is read."""

    options: dict[str, Any]
    prompt: int
    """Columns of the prompt."""
    beams: int
    expand: int
    """Rows that it makes of each."""
    ends: frozenset[int]
    pad: int
    ended: Ended | None
    """Criteria that may end a row; None with beams, which change places, and without criteria."""

    def written(self, row: int, sequence: Sequence[int]) -> list[int]:
        """Of a row of `generate`'s output what the model wrote: up to its first end token, which stays, and without what
        fills up a row that ended before the others.
        """
        length = self.ended.length(row) if self.ended else None
        new = list(sequence[self.prompt : length])
        end = next((i for i, token in enumerate(new) if token in self.ends), None)
        if end is not None:
            return new[: end + 1]
        while self.beams > 1 and new and new[-1] in (self.pad, -1):  # -1: transformers' where there is no end token
            new.pop()
        return new


def decoding_of(lm: LanguageModel, prompt: int, kwargs: dict[str, Any]) -> Decoding:
    """`generate`'s arguments completed.

    Raises:
        ContextLengthError: prompt and max_new_tokens are longer than the context.
        GenerationError: an option with which transformers reads the prompt a second time, behind the cached one; or nothing to
            be written.
    """
    options = dict(kwargs)
    given, default = options.get("generation_config"), lm.model.generation_config

    def asked(name: str) -> Any:
        return options.get(name, getattr(given, name, None))

    def chosen(name: str) -> Any:
        """As transformers does it: what a given config leaves open is the model's to say."""
        if name in options:
            return options[name]
        value = getattr(given, name, None)
        return getattr(default, name, None) if value is None else value

    refused = [name for name in REFUSED_OPTIONS if asked(name) is not None]
    if asked("use_cache") is False:
        refused.append("use_cache = False")
    if refused:
        raise GenerationError("transformers would read the prompt twice", got=", ".join(refused), hint="Leave it out")
    options |= CACHED
    new = chosen("max_new_tokens")
    if new is not None and not (isinstance(new, int | np.integer) and new >= 1):
        raise GenerationError(
            "nothing is to be written", got=f"max_new_tokens {new!r}", allowed="an integer, 1 or more"
        )
    if new is None and asked("max_length") is None:
        room = (lm.card.geometry.max_positions or prompt + DEFAULT_NEW_TOKENS) - prompt
        new = options["max_new_tokens"] = max(1, min(DEFAULT_NEW_TOKENS, room))
    inputs.check_length(lm, prompt, int(new or 0) or max(asked("max_length") - prompt, 0))
    pad, vocabulary = chosen("pad_token_id"), lm.card.geometry.vocab_size
    if pad is None or (vocabulary and pad >= vocabulary):
        pad = options["pad_token_id"] = pad_id(lm)
    ends = end_ids(chosen("eos_token_id"))
    options["eos_token_id"] = sorted(ends) or None
    beams = chosen("num_beams") or 1
    criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or [])
    if strings := chosen("stop_strings"):
        tokenizer = options.setdefault("tokenizer", lm.tokenizer)
        criteria.append(StopStringCriteria(tokenizer, strings))
    ended = Ended(criteria) if criteria and beams == 1 else None
    if criteria:
        options["stopping_criteria"] = StoppingCriteriaList([ended] if ended else criteria)
    expand = max(beams, chosen("num_return_sequences") or 1)
    return Decoding(options, prompt, beams, expand, ends, pad, ended)


def end_ids(end: Any) -> frozenset[int]:
    """End tokens as a model or a caller names them: none, one, or several, as integers, in a list, in a tensor."""
    return frozenset() if end is None else frozenset(torch.as_tensor(end).flatten().tolist())


def end_tokens(lm: LanguageModel) -> frozenset[int]:
    """Tokens that end a model's turn."""
    return end_ids(lm.model.generation_config.eos_token_id)  # type: ignore[union-attr]
