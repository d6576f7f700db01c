"""Retokenised alignment: what the published fusers were trained with.

The sharer does not read its own tokens of a message, but the receiver's, each decoded and encoded again alone, so
that both sides have one position per receiver token. Template sections keep each side's own tokens, and the shorter
one is padded. Characters that the receiver spreads over several tokens become U+FFFD on the way; the published
fusers were trained so. New fusers use `align`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from cache2cache.errors import AlignmentError
from cache2cache.text.chat import render, tokenise
from cache2cache.types import Conversation, Rendering

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Strategy = Literal["first", "longest"]
"""Which one is taken when a receiver token becomes several sharer tokens."""

CACHED_TOKENS = 1 << 16


@dataclass(frozen=True)
class Section:
    """A run of positions, the same on both sides."""

    start: int
    stop: int
    message: bool
    """Content of a message (fused), or template (not fused)."""


@dataclass(frozen=True)
class Retokenised:
    """Both sides of a conversation in N positions each, padding included."""

    receiver_ids: np.ndarray
    """(N,) int64."""
    sharer_ids: np.ndarray
    """(N,) int64."""
    receiver_padding: np.ndarray
    """(N,) bool, true where the receiver has no token; never inside of a message."""
    sharer_padding: np.ndarray
    """(N,) bool."""
    sections: tuple[Section, ...]

    @property
    def message_mask(self) -> np.ndarray:
        """(N,) bool, true inside of message contents."""
        mask = np.zeros(len(self.receiver_ids), dtype=bool)
        for section in self.sections:
            mask[section.start : section.stop] = section.message
        return mask

    @property
    def alignment(self) -> np.ndarray:
        """(N without the receiver's padding,) int64: the index into the sharer's tokens without its padding.

        Positions whose counterpart is padding map to the sharer's last token before.
        """
        counted = np.maximum(np.cumsum(~self.sharer_padding) - 1, 0)
        return counted[~self.receiver_padding]


def retokenise(
    messages: Conversation,
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    strategy: Strategy = "first",
    *,
    receiver_template: str | None = None,
    sharer_template: str | None = None,
    add_generation_prompt: bool = True,
    end_with_content: bool = False,
    receiver_variables: Mapping[str, Any] | None = None,
    sharer_variables: Mapping[str, Any] | None = None,
) -> Retokenised:
    """Align a conversation token by token.

    Args:
        end_with_content: leave out everything behind the last message's content.

    The templates and variables are `render`'s.

    Raises:
        ConversationError, TemplateError, ModelError: as `render`.
        AlignmentError: an unknown strategy, or a token for which the sharer has none.
    """
    receiver, sharer = (
        _render(tokenizer, messages, template, variables, add_generation_prompt, end_with_content)
        for tokenizer, template, variables in (
            (receiver_tokenizer, receiver_template, receiver_variables),
            (sharer_tokenizer, sharer_template, sharer_variables),
        )
    )
    parts: list[tuple[list[int], list[int], bool]] = []
    for receiver_range, sharer_range in _sections(receiver, sharer):
        ids = receiver.ids[_ending_in(receiver, *receiver_range)].tolist()
        if sharer_range is None:
            parts.append((ids, retokenise_text(ids, receiver_tokenizer, sharer_tokenizer, strategy), True))
        else:
            parts.append((ids, sharer.ids[_within(sharer, *sharer_range)].tolist(), False))
    return _join(parts, _padding(receiver_tokenizer), _padding(sharer_tokenizer))


def retokenise_text(
    text_ids: Iterable[int],
    receiver_tokenizer: PreTrainedTokenizerBase,
    sharer_tokenizer: PreTrainedTokenizerBase,
    strategy: Strategy = "first",
) -> list[int]:
    """One sharer id for each of the receiver's ids.

    Raises:
        AlignmentError: an unknown strategy, or a token for which the sharer has none.
    """
    if strategy not in get_args(Strategy):
        raise AlignmentError("unknown strategy", got=repr(strategy), allowed=get_args(Strategy))
    special = _special(receiver_tokenizer, sharer_tokenizer)
    ordinary = _converter(receiver_tokenizer, sharer_tokenizer, strategy)
    return [special[token] if token in special else ordinary(token) for token in map(int, text_ids)]


def _special(receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase) -> dict[int, int]:
    """The sharer's id for each special id of the receiver; when the receiver uses one id twice, the later role wins."""
    roles = ("pad_token_id", "eos_token_id", "bos_token_id", "unk_token_id")
    pairs = ((getattr(receiver, role), getattr(sharer, role)) for role in roles)
    return {ours: theirs for ours, theirs in pairs if ours is not None and theirs is not None}


@lru_cache(maxsize=8)
def _converter(
    receiver: PreTrainedTokenizerBase, sharer: PreTrainedTokenizerBase, strategy: Strategy
) -> Callable[[int], int]:
    """Function from an ordinary receiver id to a sharer id, with a cache of its own for this pair."""

    @lru_cache(maxsize=CACHED_TOKENS)
    def convert(token: int) -> int:
        text = str(receiver.decode([token]))
        candidates = sharer.encode(text, add_special_tokens=False)
        if not candidates:
            return _stand_in(token, text, sharer)
        if strategy == "first":
            return candidates[0]
        # Characters, not bytes, and the first of equals.
        return max(candidates, key=lambda candidate: len(sharer.decode([candidate])))

    return convert


def _stand_in(token: int, text: str, sharer: PreTrainedTokenizerBase) -> int:
    stand_in = _first_id(sharer, "unk", "pad", "eos")
    if stand_in is not None:
        return stand_in
    raise AlignmentError(
        "the sharer has no token for one of the receiver's",
        got=f"id {token}, {text!r}",
        hint='Use the "native" alignment for this pair',
    )


def _padding(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id that fills up sections. It is masked, so any will do; the published fusers used pad."""
    return _first_id(tokenizer, "pad", "eos") or 0


def _first_id(tokenizer: PreTrainedTokenizerBase, *roles: str) -> int | None:
    """The id of the first of these special tokens that the tokenizer has."""
    ids: Iterable[int | None] = (getattr(tokenizer, f"{role}_token_id") for role in roles)
    return next((token for token in ids if token is not None), None)


def _render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Conversation,
    template: str | None,
    variables: Mapping[str, Any] | None,
    add_generation_prompt: bool,
    end_with_content: bool,
) -> Rendering:
    rendering = render(
        tokenizer,
        messages,
        template=template,
        add_generation_prompt=add_generation_prompt,
        outer_space=True,
        variables=variables,
    )
    if not end_with_content:
        return rendering
    return tokenise(tokenizer, rendering.text[: rendering.ranges[-1][1]], rendering.ranges)


def _sections(receiver: Rendering, sharer: Rendering) -> list[tuple[tuple[int, int], tuple[int, int] | None]]:
    """Character ranges (receiver's, sharer's) of all sections in order; the sharer's is None for a message.

    A message of which the receiver reads nothing is no section: the template around it is one.
    """
    sections: list[tuple[tuple[int, int], tuple[int, int] | None]] = []
    here, there = 0, 0
    for ours, theirs in zip(receiver.ranges, sharer.ranges, strict=True):
        if ours[0] < ours[1]:
            sections += [((here, ours[0]), (there, theirs[0])), (ours, None)]
            here, there = ours[1], theirs[1]
    return [*sections, ((here, len(receiver.text)), (there, len(sharer.text)))]


def _ending_in(rendering: Rendering, start: int, stop: int) -> np.ndarray:
    """(N,) bool: the tokens whose last character is in the range. Every token is in one section, none gets lost."""
    last = np.minimum(np.maximum(rendering.ends - 1, rendering.starts), len(rendering.text) - 1)
    return (start <= last) & (last < stop)


def _within(rendering: Rendering, start: int, stop: int) -> np.ndarray:
    """(N,) bool: the tokens that lie wholly in the range.

    A sharer token on the border to a message is left out, since the message comes from the receiver's tokens.
    """
    return (start <= rendering.starts) & (rendering.ends <= stop)


def _join(parts: list[tuple[list[int], list[int], bool]], receiver_pad: int, sharer_pad: int) -> Retokenised:
    """Pad the shorter side of each section on its right, and put all sections together; empty ones vanish."""
    receiver, sharer, receiver_padding, sharer_padding, sections = [], [], [], [], []
    for ours, theirs, message in parts:
        start, length = len(receiver), max(len(ours), len(theirs))
        if length:
            sections.append(Section(start, start + length, message))
        for ids, mask, own, pad in (
            (receiver, receiver_padding, ours, receiver_pad),
            (sharer, sharer_padding, theirs, sharer_pad),
        ):
            missing = length - len(own)
            ids += own + [pad] * missing
            mask += [False] * len(own) + [True] * missing
    return Retokenised(
        np.array(receiver, dtype=np.int64),
        np.array(sharer, dtype=np.int64),
        np.array(receiver_padding, dtype=bool),
        np.array(sharer_padding, dtype=bool),
        tuple(sections),
    )
