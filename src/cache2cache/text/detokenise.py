"""From token ids to text while they arrive: whole characters only, and nothing that belongs to a stop text."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What a tokenizer makes of bytes that are no character, or not yet."""

_BEFORE = "a"
"""Text behind which tokens are spelled."""


class Detokeniser:
    """One answer's text, piece by piece; special tokens are left out. All pieces together are the answer.

    Args:
        stop: texts before which the answer ends.
        before: tokens of a text that the answer goes on with; without any, it is a text of its own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = (), before: Sequence[int] = ()):
        self._tokenizer, self._stop = tokenizer, stop
        self._ids = list(before)
        # ids[:_read] are text already. Those from _start on are decoded again with the new ones, because some tokenizers
        # write a token in another way at the beginning of a text.
        self._start, self._read = 0, len(self._ids)
        self._held = ""
        self.stopped = False
        """Whether a stop text was met; nothing may be added afterwards."""

    def add(self, token: int) -> str:
        """What is certain now: the text so far without incomplete characters and possible beginnings of stop texts."""
        self._ids.append(token)
        new = self._new()
        if not new or new.endswith(_INCOMPLETE):
            return ""
        self._start, self._read = self._read, len(self._ids)
        return self._past_stops(new)

    def end(self) -> str:
        """Whatever was held back, incomplete characters included; nothing if a stop text was met."""
        if self.stopped:
            return ""
        text = self._past_stops(self._new())
        self._held, rest = "", self._held
        return text + rest

    def _new(self) -> str:
        before = self._decode(self._ids[self._start : self._read])
        return self._decode(self._ids[self._start :])[len(before) :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids, skip_special_tokens=True))

    def _past_stops(self, new: str) -> str:
        text = self._held + new
        met = [at for stop in self._stop if (at := text.find(stop)) >= 0]
        self.stopped = bool(met)
        certain = min(met) if met else len(text) - self._begun(text)
        self._held = "" if met else text[certain:]
        return text[:certain]

    def _begun(self, text: str) -> int:
        """Length of the longest end of a text with which a stop text may begin."""
        lengths = (n for stop in self._stop for n in range(1, len(stop)) if text.endswith(stop[:n]))
        return max(lengths, default=0)


class Speller:
    """What single tokens, special ones as well, are in a text."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self._tokenizer = tokenizer
        self._before = tokenizer.encode(_BEFORE, add_special_tokens=False)
        self._length = len(self._decode(self._before))

    def __call__(self, token: int, *, first: bool = False) -> str:
        """A token's text; with `first`, at the beginning, where some tokenizers leave a space out."""
        return self._decode([token]) if first else self._decode([*self._before, token])[self._length :]

    def _decode(self, ids: list[int]) -> str:
        return str(self._tokenizer.decode(ids))
