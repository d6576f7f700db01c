"""The sharer as a teacher: its next-token distributions along a response, said in the receiver's tokens.

The sharer reads its own prompt and its own tokens of the response. Where a token of the receiver's begins at a character at
which one of the sharer's begins too, both models predict what follows the same text, and the distributions compare::

    p(v) ∝ Σ p_sharer(s) over the sharer's tokens s that spell the text of v

for the receiver's tokens v; the K likeliest are kept and normalised. A side whose prompt ends in a word begins its answer with
a space ("Answer: B"), the other does not: on that side the text is taken without it. Where the sharer's template ends an
answer with a special token, that one and the end of the receiver's turn are one; a template that just goes on with text says
nothing about where an answer ends, so there the end of a response has no teacher.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cache2cache.errors import DataError
from cache2cache.evaluate.scoring import lead
from cache2cache.models import kv
from cache2cache.models.head import logits_at
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.text.chat import render, tokenise
from cache2cache.train.batch import Teacher, TrainRow

_BATCH_TOKENS = 2048
_DIALOGUE = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def teachers(rows: Sequence[TrainRow], pair: C2C, vocabulary: SharedVocabulary, top: int) -> Iterator[Teacher]:
    """The sharer's distributions along the response of each row, in order.

    Args:
        vocabulary: of this pair; to build one takes a second.
        top: K, how many tokens are kept.

    Raises:
        DataError: the models share no token, or a row's response is not what the receiver's tokenizer makes of its text.
    """
    (sharer,) = pair.sharers
    for batch in _batches([_lesson(row, pair) for row in rows]):
        predicted = iter(_predicted(sharer, batch))
        for lesson in batch:
            yield _teacher(lesson, next(predicted), vocabulary, top)


@dataclass(frozen=True)
class _Lesson:
    ids: np.ndarray
    """What the sharer reads: its prompt, and its tokens of the response."""
    taught: np.ndarray
    """(n,) positions in the receiver's response where the distributions compare."""
    read: np.ndarray
    """(n,) the sharer's positions whose predictions those are."""
    response: np.ndarray
    """(T,)"""
    spaced: tuple[bool, bool]
    """Whether receiver and sharer begin the response with a space."""


def _lesson(row: TrainRow, pair: C2C) -> _Lesson:
    (sharer,), (part,) = pair.sharers, row.row.sharers
    assert part is not None, "every training row has a sharer"
    own, edges, own_spaced = _spelled(pair.receiver, row.row.ids, row.text)
    if not np.array_equal(own, row.response[:-1]):
        raise DataError("a response is not made of its text's tokens", got=row.response.tolist(), allowed=own.tolist())
    theirs, their_edges, their_spaced = _spelled(sharer, part.ids, row.text)
    # Of tokens that spell nothing of the text, such as a lone space before it, the last one counts.
    where = {edge: j for j, edge in enumerate(their_edges.tolist()) if edge >= 0}
    advances = np.append(edges[1:] != edges[:-1], True)
    taught = [t for t, edge in enumerate(edges.tolist()) if edge in where and advances[t]]
    read = [len(part.ids) - 1 + where[int(edges[t])] for t in taught]
    ids = np.concatenate([part.ids, theirs])
    return _Lesson(ids, np.array(taught, int), np.array(read, int), row.response, (own_spaced, their_spaced))


def _spelled(lm: LanguageModel, prompt: np.ndarray, text: str) -> tuple[np.ndarray, np.ndarray, bool]:
    """A model's tokens (n,) of a response; how many characters of it are written before each of them and after the last,
    (n + 1,), −1 in the middle of a character; and whether it begins with a space that is not the response's.
    """
    before = lead(lm, torch.as_tensor(prompt[-1:]))
    answer = tokenise(lm.tokenizer, before + text, ())
    edges = np.append(0, answer.ends - len(before)).clip(min=0)
    edges[1:-1][answer.starts[1:] < answer.ends[:-1]] = -1
    return answer.ids, edges, bool(before)


def _batches(lessons: Sequence[_Lesson]) -> Iterator[list[_Lesson]]:
    batch: list[_Lesson] = []
    for lesson in lessons:
        width = max(len(other.ids) for other in (*batch, lesson))
        if batch and width * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(lesson)
    if batch:
        yield batch


@torch.no_grad()
def _predicted(sharer: LanguageModel, batch: Sequence[_Lesson]) -> tuple[torch.Tensor, ...]:
    """Logits (n, V) of each lesson."""
    width = max(len(lesson.ids) for lesson in batch)
    ids, mask = torch.zeros((2, len(batch), width), dtype=torch.long)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for b, lesson in enumerate(batch):
        left = width - len(lesson.ids)
        ids[b, left:], mask[b, left:] = torch.as_tensor(lesson.ids), 1
        wanted[b, left + lesson.read] = True
    device = sharer.device
    logits = logits_at(sharer.model, ids.to(device), mask.to(device), kv.new_cache(), wanted.to(device))
    return logits.split([len(lesson.read) for lesson in batch])


def _teacher(lesson: _Lesson, logits: torch.Tensor, vocabulary: SharedVocabulary, top: int) -> Teacher:
    ids = torch.zeros((len(lesson.response), top), dtype=torch.long)
    logprobs = torch.full(ids.shape, -torch.inf)
    first = int((lesson.taught == 0).sum())  # its text may lack a space, that of the others does not
    for part, spaced in ((slice(first), lesson.spaced), (slice(first, None), (False, False))):
        if not len(lesson.taught[part]):
            continue
        sources, targets, tokens = vocabulary.shared(int(lesson.response[-1]), *spaced)
        p = logits[part].float().softmax(-1).cpu()
        shared = p.new_zeros((len(p), len(tokens))).index_add_(1, targets, p[:, sources])
        best, at = shared.topk(min(top, len(tokens)))
        total = best.sum(1, keepdim=True)
        rows = torch.as_tensor(lesson.taught[part])[:, None], torch.arange(best.shape[1])
        ids[rows] = tokens[at]
        logprobs[rows] = torch.where(total > 0, (best / total).log(), -torch.inf)
    return Teacher(ids, logprobs)


class SharedVocabulary:
    """Which tokens of receiver and sharer spell the same."""

    def __init__(self, pair: C2C):
        (sharer,), (fuser,) = pair.sharers, pair.fusers
        self._receiver, self._sharer = _texts(pair.receiver.tokenizer), _texts(sharer.tokenizer)
        self._end = _end_of_answer(sharer.tokenizer, fuser.config.sharer_template)
        self.shared = cache(self._shared)

    def _shared(
        self, end: int, own_spaced: bool, their_spaced: bool
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Sharer ids (J,), the place of each among the shared tokens (J,), and those tokens' receiver ids (R,).

        Args:
            end: the receiver's token that ends a turn.
            own_spaced, their_spaced: whether the side is about to begin its answer with a space.
        """
        # Of several tokens with one text the last: those that stand for single bytes come first in vocabularies.
        own = {text[own_spaced:]: i for i, text in self._receiver.items() if text.startswith(" " * own_spaced)}
        place = {text: at for at, text in enumerate(own)}
        said = ((i, text.removeprefix(" " * their_spaced)) for i, text in self._sharer.items())
        pairs = [(i, place[text]) for i, text in said if text in place]
        tokens = list(own.values())
        if self._end is not None:
            pairs.append((self._end, len(tokens)))
            tokens.append(end)
        if not pairs:
            raise DataError("receiver and sharer have no token in common", hint="Train without objective.distill")
        sources, targets = torch.tensor(pairs).T
        used, targets = targets.unique(return_inverse=True)
        return sources, targets, torch.tensor(tokens)[used]


def _texts(tokenizer: PreTrainedTokenizerBase) -> dict[int, str]:
    """What each ordinary token spells in the middle of a text; tokens that are part of a character are left out."""
    anchor = tokenizer("a", add_special_tokens=False)["input_ids"][-1]  # type: ignore[index]
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    ids = [i for i in range(len(tokenizer)) if i not in special]
    before = str(tokenizer.decode([anchor]))
    spelled = tokenizer.batch_decode([[anchor, i] for i in ids], clean_up_tokenization_spaces=False)
    texts = ((i, text.removeprefix(before)) for i, text in zip(ids, spelled, strict=True))
    return {i: text for i, text in texts if text and "\ufffd" not in text}


def _end_of_answer(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    """The special token that a template writes behind an answer, None if it goes on with text."""
    whole = render(tokenizer, _DIALOGUE, template=template, add_generation_prompt=False)  # type: ignore[arg-type]
    behind = whole.ids[whole.starts >= whole.ranges[-1][1]].tolist()
    token = tokenizer.added_tokens_decoder.get(behind[0]) if behind else None
    return behind[0] if token is not None and token.special else None
