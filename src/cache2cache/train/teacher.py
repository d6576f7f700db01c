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
from itertools import product

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from cache2cache.errors import DataError
from cache2cache.models import kv
from cache2cache.models.head import logits_at
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.text.chat import render
from cache2cache.train.batch import Teacher, TrainRow
from cache2cache.train.pairing import Pairing, paired

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
    for batch in _batches([_Lesson(paired(row, pair), row.response) for row in rows]):
        predicted = iter(_predicted(sharer, batch))
        for lesson in batch:
            yield _teacher(lesson, next(predicted), vocabulary, top)


@dataclass(frozen=True)
class _Lesson:
    pairing: Pairing
    response: np.ndarray
    """(T,)"""


def _batches(lessons: Sequence[_Lesson]) -> Iterator[list[_Lesson]]:
    batch: list[_Lesson] = []
    for lesson in lessons:
        width = max(len(other.pairing.ids) for other in (*batch, lesson))
        if batch and width * (len(batch) + 1) > _BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(lesson)
    if batch:
        yield batch


@torch.no_grad()
def _predicted(sharer: LanguageModel, batch: Sequence[_Lesson]) -> tuple[torch.Tensor, ...]:
    """Logits (n, V) of each lesson."""
    width = max(len(lesson.pairing.ids) for lesson in batch)
    ids, mask = torch.zeros((2, len(batch), width), dtype=torch.long)
    wanted = torch.zeros(ids.shape, dtype=torch.bool)
    for b, lesson in enumerate(batch):
        both = lesson.pairing
        left = width - len(both.ids)
        ids[b, left:], mask[b, left:] = torch.as_tensor(both.ids), 1
        wanted[b, left + both.read] = True
    device = sharer.device
    logits = logits_at(sharer.model, ids.to(device), mask.to(device), kv.new_cache(), wanted.to(device))
    return logits.split([len(lesson.pairing.read) for lesson in batch])


def _teacher(lesson: _Lesson, logits: torch.Tensor, vocabulary: SharedVocabulary, top: int) -> Teacher:
    ids = torch.zeros((len(lesson.response), top), dtype=torch.long)
    logprobs = torch.full(ids.shape, -torch.inf)
    both = lesson.pairing
    taught = both.met < len(lesson.response) - (vocabulary.end is None)
    for own, their in product((False, True), repeat=2):
        part = np.flatnonzero(taught & (both.spaced == (own, their)).all(axis=1))
        if not len(part):
            continue
        sources, targets, tokens = vocabulary.shared(int(lesson.response[-1]), own, their)
        p = logits[torch.as_tensor(part)].float().softmax(-1).cpu()
        shared = p.new_zeros((len(p), len(tokens))).index_add_(1, targets, p[:, sources])
        best, at = shared.topk(min(top, len(tokens)))
        total = best.sum(1, keepdim=True)
        rows = torch.as_tensor(both.met[part])[:, None], torch.arange(best.shape[1])
        ids[rows] = tokens[at]
        logprobs[rows] = torch.where(total > 0, (best / total).log(), -torch.inf)
    return Teacher(ids, logprobs)


class SharedVocabulary:
    """Which tokens of receiver and sharer spell the same."""

    def __init__(self, pair: C2C):
        (sharer,), (fuser,) = pair.sharers, pair.fusers
        self._receiver, self._sharer = _texts(pair.receiver.tokenizer), _texts(sharer.tokenizer)
        self.end = end_of_answer(sharer.tokenizer, fuser.config.sharer_template)
        """The sharer's token; None where a response's end has no teacher."""
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
        if self.end is not None:
            pairs.append((self.end, len(tokens)))
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


def end_of_answer(tokenizer: PreTrainedTokenizerBase, template: str | None) -> int | None:
    """The special token that a template writes behind an answer, None if it goes on with text."""
    whole = render(tokenizer, _DIALOGUE, template=template, add_generation_prompt=False)  # type: ignore[arg-type]
    behind = whole.ids[whole.starts >= whole.ranges[-1][1]].tolist()
    token = tokenizer.added_tokens_decoder.get(behind[0]) if behind else None
    return behind[0] if token is not None and token.special else None
