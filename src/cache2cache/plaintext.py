"""Plain text as a pair reads it: as it is, without a template on either side."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace

from cache2cache import inputs
from cache2cache.fuser.base import Fuser
from cache2cache.inputs import Row, SharerRow
from cache2cache.pipeline import C2C
from cache2cache.text import chat
from cache2cache.types import Message, Timings

_TEXT = "{{ messages[0]['content'] }}"


def row(pair: C2C, text: str, speaking: Sequence[int], *, begin: bool = True, timings: Timings | None = None) -> Row:
    """A text that is to be gone on with.

    Args:
        speaking: indices of the sharers that speak.
        begin: put the receiver's beginning of sequence before the text if its tokenizer would. The sharers' always is.

    Raises:
        AlignmentError, ContextLengthError: see `inputs.row`.
    """
    template = chat.BOS + _TEXT if begin else _TEXT
    fusers = [_of_text(fuser, template) for fuser in pair.fusers]
    message = Message(role="user", content=text)
    read = inputs.row([message], pair.receiver, pair.sharers, fusers, speaking, timings or Timings(), template)
    return replace(read, sharers=tuple(map(_anchored, read.sharers, pair.fusers)))


def _of_text(fuser: Fuser, template: str) -> Fuser:
    """The same fuser for models that read plain text."""
    view = copy.copy(fuser)
    templates = {"receiver_template": template, "sharer_template": chat.BOS + _TEXT}
    view.config = fuser.config.model_copy(update=templates)
    return view


def _anchored(part: SharerRow | None, fuser: Fuser) -> SharerRow | None:
    """The last fused token looks at the sharer's last position, as at the end of a template (see `text.align`)."""
    if part is None or fuser.config.alignment != "native":
        return part
    alignment = part.alignment.copy()
    alignment[-2:] = len(part.ids) - 1
    return replace(part, alignment=alignment)
