"""What `transformers.generate` is asked for behind a cache that holds the prompt already."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.stopping_criteria import StopStringCriteria

from cache2cache import inputs
from cache2cache.errors import GenerationError
from cache2cache.models.load import LanguageModel, pad_id

DEFAULT_NEW_TOKENS = 256
"""Asked for when neither max_new_tokens nor max_length is given, as far as the context has room."""

REFUSED_OPTIONS = (
    "assistant_model", "assistant_early_exit", "prompt_lookup_num_tokens", "use_mtp", "prefill_chunk_size",
    "token_healing", "cache_implementation",
)  # fmt: skip
"""With these, transformers 5.19 ignores that a cache holds the prompt already, changes the prompt behind it, or wants a cache
of its own."""

_KNOWN = [name for name in REFUSED_OPTIONS if name == "assistant_model" or hasattr(GenerationConfig(), name)]
"""Not every version of transformers knows all."""

CACHED: Mapping[str, Any] = MappingProxyType({**dict.fromkeys(_KNOWN), "use_cache": True})
"""The same for a model's own defaults, which nobody asked for and which only decide how fast it writes."""


PLAIN: Mapping[str, Any] = MappingProxyType({
    "repetition_penalty": 1.0,
    **dict.fromkeys((
        "no_repeat_ngram_size", "min_length", "min_new_tokens", "max_time", "stop_strings", "exponential_decay_length_penalty",
        "forced_bos_token_id", "forced_eos_token_id", "begin_suppress_tokens",
    )),
})  # fmt: skip
"""A model's own defaults that would put another token in the place of the likeliest, or end an answer early, switched off. Some
look at a whole batch, padding included, or at what they take for an answer's first token."""

GREEDY: Mapping[str, Any] = MappingProxyType({**PLAIN, "do_sample": False, "num_beams": 1})
"""The likeliest token that a model's config does not forbid."""


class Full(StoppingCriteria):
    """Ends each row where its own context ends, which is later than that of the longest row of its batch.

    Args:
        rooms: most tokens of each answer.
        prompt: columns of the prompt.
    """

    def __init__(self, rooms: Sequence[int], prompt: int):
        self._rooms, self._prompt = torch.tensor(rooms), prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        rooms = self._rooms.repeat_interleave(len(input_ids) // len(self._rooms))
        return (rooms <= input_ids.shape[1] - self._prompt).to(input_ids.device)


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


def decoding_of(lm: LanguageModel, mask: torch.Tensor, kwargs: dict[str, Any]) -> Decoding:
    """`generate`'s arguments completed.

    Args:
        mask: (B, N) of the prompt.

    Raises:
        ContextLengthError: prompt and max_new_tokens are longer than the context.
        GenerationError: an option with which transformers would not write from the cache that holds the prompt, see
            `REFUSED_OPTIONS`; or nothing to be written.
    """
    prompt = mask.shape[1]
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

    # By identity, since 0 is not False here: it switches prompt lookup on.
    refused = [name for name in REFUSED_OPTIONS if asked(name) is not None and asked(name) is not False]
    if asked("use_cache") is False:
        refused.append("use_cache = False")
    if refused:
        raise GenerationError(
            "transformers would not write from the cache that holds the prompt, or would read the prompt twice",
            got=", ".join(refused), hint="Leave it out",
        )  # fmt: skip
    options |= CACHED
    new = chosen("max_new_tokens")
    if new is not None and not (isinstance(new, int | np.integer) and new >= 1):
        raise GenerationError(
            "nothing is to be written", got=f"max_new_tokens {new!r}", allowed="an integer, 1 or more"
        )
    criteria = StoppingCriteriaList(options.pop("stopping_criteria", None) or [])
    if new is None and asked("max_length") is None:
        rooms = _rooms(lm, mask)
        new, options["max_new_tokens"] = min(rooms), max(rooms)
        if new < max(rooms):
            criteria.append(Full(rooms, prompt))
    inputs.check_length(lm, prompt, int(new or 0) or max(asked("max_length") - prompt, 0))
    pad, vocabulary = chosen("pad_token_id"), lm.card.geometry.vocab_size
    if pad is None or (vocabulary and pad >= vocabulary):
        pad = options["pad_token_id"] = pad_id(lm)
    ends = end_ids(chosen("eos_token_id"))
    options["eos_token_id"] = sorted(ends) or None
    beams = chosen("num_beams") or 1
    if strings := chosen("stop_strings"):
        tokenizer = options.setdefault("tokenizer", lm.tokenizer)
        criteria.append(StopStringCriteria(tokenizer, strings))
    ended = Ended(criteria) if criteria and beams == 1 else None
    if criteria:
        options["stopping_criteria"] = StoppingCriteriaList([ended] if ended else criteria)
    expand = max(beams, chosen("num_return_sequences") or 1)
    return Decoding(options, prompt, beams, expand, ends, pad, ended)


def _rooms(lm: LanguageModel, mask: torch.Tensor) -> list[int]:
    """Most tokens of each row's answer, where nobody says."""
    size, prompt = lm.card.geometry, mask.shape[1]
    read = mask.sum(1)
    lengths = read + prompt - read.max()  # columns that pad all rows count, as in the context
    if not size.ropes:  # a row that has ended goes on as padding, for which a table of positions has no more entries
        lengths = torch.full_like(read, prompt)
    context = size.max_positions or prompt + DEFAULT_NEW_TOKENS
    return (context - lengths).clamp(1, DEFAULT_NEW_TOKENS).tolist()


def end_ids(end: Any) -> frozenset[int]:
    """End tokens as a model or a caller names them: none, one, or several, as integers, in a list, in a tensor."""
    return frozenset() if end is None else frozenset(torch.as_tensor(end).flatten().tolist())


def end_tokens(lm: LanguageModel) -> frozenset[int]:
    """Tokens that end a model's turn."""
    return end_ids(lm.model.generation_config.eos_token_id)  # type: ignore[union-attr]
