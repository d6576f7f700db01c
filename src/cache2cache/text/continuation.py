"""What a model writes behind its prompt: the tokens of a text as they are when the prompt stands before it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from transformers import PreTrainedTokenizerBase

from cache2cache.text.chat import tokenise
from cache2cache.text.detokenise import Speller

_ANCHORS = ("\n", ".", "a")
"""Texts behind which a text is spelled by tokenizers that write a space before one that stands alone: one of them does not
make a token together with it."""


@dataclass(frozen=True)
class Continuation:
    """A text behind a prompt."""

    ids: np.ndarray
    """(n,)"""
    starts: np.ndarray
    """(n,) first character of the text that each token covers; below 0 in a space that is not the text's."""
    ends: np.ndarray
    """(n,) one past the last."""
    spaced: bool
    """Whether it begins with a space that is not the text's."""


def continued(tokenizer: PreTrainedTokenizerBase, last: int, text: str) -> Continuation:
    """A text as it is written behind a prompt.

    A prompt that ends in a word, such as "Answer:", asks for a space before its answer. And many tokenizers
    (SentencePiece's) write a space before a text that stands alone, but not before one that goes on from another.

    Args:
        last: the prompt's last token.

    Raises:
        ModelError: the tokenizer cannot tell the characters of its tokens.
    """
    before = str(tokenizer.decode([last]))
    # Of a token alone, some decoders leave out a space.
    written = before or Speller(tokenizer)(last)
    lead = "" if last in tokenizer.all_special_ids or written[-1:].isspace() else " "
    # A token may lie across the border, which the prompt rules out.
    for anchor in (written, *(_ANCHORS if _spaces(tokenizer) else ())):
        prompt, behind = tokenise(tokenizer, anchor, ()), tokenise(tokenizer, anchor + lead + text, ())
        first = len(prompt.ids)
        if np.array_equal(behind.ids[:first], prompt.ids):
            break
    else:
        anchor, behind, first = "", tokenise(tokenizer, lead + text, ()), 0
    begin = len(anchor) + len(lead)
    return Continuation(behind.ids[first:], behind.starts[first:] - begin, behind.ends[first:] - begin, bool(lead))


@lru_cache(maxsize=8)
def _spaces(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether it writes a space before a text that stands alone."""
    alone = tokenizer.encode("a", add_special_tokens=False)
    return "a a" in str(tokenizer.decode([*alone, *alone]))
