"""Native alignment: which of the sharer's positions stands for each of the receiver's.

Both sides tokenised their own rendering of the same messages. Inside a message, a receiver token maps to the
sharer token that covers the same character; between messages, template tokens map to template tokens.

Knows nothing about tokenizers, templates or models: character offsets are all it sees.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache2cache.errors import AlignmentError
from cache2cache.types import Rendering


def align(receiver: Rendering, sharer: Rendering, *, answer_anchor: bool = True) -> np.ndarray:
    """(N,) int64: the sharer position for each receiver position, never decreasing.

    A token belongs to the section, message content or template, in which its last character lies.

    - A content token maps to the first sharer token that reaches as far into the same message. Of several tokens
      that share one multi-byte character, the last map to the last.
    - Template tokens map to the sharer's template tokens of the same section, the last to the last; where the
      sharer has fewer, the surplus on the left maps to its first, and where it has none, to its last token before.

    Args:
        answer_anchor: the receiver's last prompt token is never fused, so in the last template section (what makes
            the model answer) the last *fused* token, N - 2, maps to the sharer's last position and so on leftwards.
            With False, identical renderings align to the identity.

    Raises:
        AlignmentError: the renderings differ in their number of messages, or the sharer's has no tokens.
    """
    if len(receiver.ranges) != len(sharer.ranges):
        raise AlignmentError(
            "the two renderings are not of the same conversation",
            got=f"{len(receiver.ranges)} and {len(sharer.ranges)} messages",
        )
    if not sharer.ids.size:
        raise AlignmentError("the sharer's rendering has no tokens", got=repr(sharer.text))
    if not receiver.ids.size:
        return np.zeros(0, dtype=np.int64)
    rows, columns = _Sections.of(receiver), _Sections.of(sharer)
    inside = rows.section % 2 == 1
    aligned = np.where(inside, _content(rows, columns), _template(rows, columns, answer_anchor))
    return np.maximum.accumulate(np.maximum(aligned, 0))


@dataclass(frozen=True)
class _Sections:
    """Tokens of one side, sorted into sections: 2k is the template before message k, 2k + 1 is its content."""

    bounds: np.ndarray
    """(messages, 2) first and last + 1 character of each content."""
    ends: np.ndarray
    """(N,) one past the last character of each token, never decreasing."""
    section: np.ndarray
    """(N,) never decreasing."""

    @classmethod
    def of(cls, rendering: Rendering) -> _Sections:
        bounds = np.array(rendering.ranges, dtype=np.int64).reshape(-1, 2)
        ends = np.maximum.accumulate(rendering.ends)
        # A token without characters lies where it starts.
        last = np.maximum.accumulate(np.maximum(rendering.ends - 1, rendering.starts))
        begun = np.searchsorted(bounds[:, 0], last, side="right")
        within = (begun > 0) & (last < np.append(bounds[:, 1], -1)[begun - 1])
        return cls(bounds, ends, 2 * begun - within)

    def runs(self) -> tuple[np.ndarray, np.ndarray]:
        """(N,) first token and (N,) last token + 1 of the run of tokens that end at the same character."""
        return np.searchsorted(self.ends, self.ends, "left"), np.searchsorted(self.ends, self.ends, "right")


def _content(rows: _Sections, columns: _Sections) -> np.ndarray:
    """(N,) sharer position for each receiver token as if it were content; rubbish for template tokens."""
    if not len(rows.bounds):
        return np.zeros_like(rows.section)
    message = np.minimum(rows.section // 2, len(rows.bounds) - 1)
    starts, stops = rows.bounds[message].T
    other_starts, other_stops = columns.bounds[message].T
    # Where a template rewrote the content, the lengths differ. Templates drop leading parts (a reasoning
    # block, for instance), so the ends are what corresponds.
    same = stops - starts == other_stops - other_starts
    points = np.where(same, other_starts + rows.ends - starts, other_stops + rows.ends - stops)
    points = np.minimum(np.maximum(points, other_starts + 1), other_stops)
    first = np.minimum(np.searchsorted(columns.ends, points, "left"), len(columns.ends) - 1)
    # Several tokens of one multi-byte character end at the same point: pair them from the right.
    exact = columns.ends[first] == points
    after = np.where(exact, np.searchsorted(columns.ends, points, "right"), first + 1)
    to_the_right = rows.runs()[1] - 1 - np.arange(len(rows.ends))
    return np.maximum(first, after - 1 - to_the_right)


def _template(rows: _Sections, columns: _Sections, answer_anchor: bool) -> np.ndarray:
    """(N,) sharer position for each receiver token as if it were template, right-aligned in its section."""
    first = np.searchsorted(columns.section, rows.section, "left")
    last = np.searchsorted(columns.section, rows.section, "right") - 1
    to_the_right = np.searchsorted(rows.section, rows.section, "right") - 1 - np.arange(len(rows.ends))
    if answer_anchor:
        final = rows.section == 2 * len(rows.bounds)
        to_the_right = np.where(final, np.maximum(to_the_right - 1, 0), to_the_right)
    # Where the sharer has no token in the section, last = first - 1 is its last token before it.
    return np.minimum(np.maximum(first, last - to_the_right), last)
