"""Where, along a response, receiver and sharer are about to write at the same character."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache2cache.errors import DataError
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.text.continuation import continued
from cache2cache.train.batch import TrainRow


@dataclass(frozen=True)
class Pairing:
    """A response as both models write it."""

    ids: np.ndarray
    """What the sharer reads: its prompt, and its tokens of the whole response."""
    met: np.ndarray
    """(n,) places t in the receiver's response, whose token t begins at a character where one of the sharer's begins too, or
    which is the end of the turn."""
    read: np.ndarray
    """(n,) the sharer's last positions before those characters: what it predicts there is what the receiver predicts."""
    spaced: np.ndarray
    """(n, 2) bool: whether receiver and sharer are about to write a space there of their own with the first word."""


def paired(row: TrainRow, pair: C2C) -> Pairing:
    """The response of a row on both sides.

    Raises:
        DataError: it is not what the receiver's tokenizer makes of its text.
    """
    (sharer,), (part,) = pair.sharers, row.row.sharers
    assert part is not None, "every training row has a sharer"
    own, edges, own_spaced = _spelled(pair.receiver, row.row.ids, row.text)
    count = len(row.response)  # the end of the turn is one more, unless the row has only the response's beginning
    if count > len(own) + 1 or not np.array_equal(own[:count], row.response[: len(own)]):
        raise DataError("a response is not made of its text's tokens", got=row.response.tolist(), allowed=own.tolist())
    theirs, their_edges, their_spaced = _spelled(sharer, part.ids, row.text)
    # Of tokens that spell nothing of the text, such as a lone space before it, the last one counts.
    where = {edge: j for j, edge in enumerate(their_edges.tolist()) if edge >= 0}
    advances = np.append(edges[1:] != edges[:-1], True)
    met = [t for t, edge in enumerate(edges[:count].tolist()) if edge in where and advances[t]]
    read = [len(part.ids) - 1 + where[int(edges[t])] for t in met]
    met, read = np.array(met, int), np.array(read, int)
    # Only with the first token; behind one that is a lone space, none is due.
    spaced = np.stack([own_spaced & (met == 0), their_spaced & (read == len(part.ids) - 1)], axis=1)
    return Pairing(np.concatenate([part.ids, theirs]), met, read, spaced)


def _spelled(lm: LanguageModel, prompt: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """A model's tokens (n,) of a response; how many characters of it are written before each of them and after the last,
    (n + 1,), −1 in the middle of a character; and whether it begins with a space that is not the response's.
    """
    answer = continued(lm.tokenizer, int(prompt[-1]), text)
    edges = np.append(0, answer.ends).clip(min=0)
    edges[1:-1][answer.starts[1:] < answer.ends[:-1]] = -1
    return answer.ids, edges, answer.spaced
