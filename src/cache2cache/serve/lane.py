"""One answering model and the batch that it writes: rows join and leave it between calls of `generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch.nn.functional import pad
from transformers import DynamicCache, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from cache2cache.decoding import CACHED, GREEDY, end_tokens
from cache2cache.models import kv
from cache2cache.models.load import pad_id
from cache2cache.pipeline import C2C, Prefill
from cache2cache.serve.job import Answer
from cache2cache.serve.sampling import Sampler

_OPTIONS = {**GREEDY, **CACHED, "return_dict_in_generate": False}
"""Draws follow the request and nothing else: `Sampler` leaves one token to choose."""


class Lane:
    """A batch, and the pair that writes it.

    Args:
        pair: whose receiver answers.
    """

    def __init__(self, pair: C2C):
        self.pair = pair
        self.answers: list[Answer] = []
        self.ends = end_tokens(pair.receiver)
        """Tokens that end the receiver's turn."""
        self.clear()

    def clear(self) -> None:
        """Forget the batch."""
        self.answers = []
        self._ids = self._mask = torch.zeros((0, 0), dtype=torch.long)  # (B, W), the last token not in the cache
        self._cache = kv.new_cache()

    def join(self, answers: Sequence[Answer], prefill: Prefill) -> None:
        """Go on with these as well, one per row of the prefill."""
        ids, mask, cache = prefill.ids.cpu(), prefill.mask.cpu(), prefill.cache
        if self.answers:
            width = max(self._ids.shape[1], ids.shape[1])
            # Layer by layer, so that no more than one is held twice.
            for layer in range(self.pair.receiver.card.geometry.layers):
                old, new = self._held(self._cache, layer, len(self.answers)), self._held(cache, layer, len(answers))
                wide = [
                    [pad(x, (0, 0, width - 1 - x.shape[2], 0)) for x in both] for both in zip(old, new, strict=True)
                ]
                kv.adopt_layer(self._cache, layer, *map(torch.cat, wide))
            rows = ((self._ids, ids), (self._mask, mask))
            ids, mask = (torch.cat([pad(x, (width - x.shape[1], 0)) for x in both]) for both in rows)
            cache = self._cache
        self._ids, self._mask, self._cache, self.answers = ids, mask, cache, [*self.answers, *answers]

    def _held(self, cache: DynamicCache, layer: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; none if all prompts have one token, of which none has been read."""
        if layer < len(cache.layers):
            return kv.layer_tensors(cache, layer)
        lm, size = self.pair.receiver, self.pair.receiver.card.geometry
        empty = torch.zeros((rows, size.kv_heads, 0, size.head_dim), dtype=lm.dtype, device=lm.device)
        return empty, empty

    def write(self, enough: Callable[[int], bool]) -> None:
        """Write on until half of the rows are done.

        Args:
            enough: whether to return earlier, asked after each token with the number of tokens so far.
        """
        model = self.pair.receiver.model
        sampler = Sampler([answer.draw for answer in self.answers])
        ids = model.generate(  # type: ignore[operator]
            self._ids.to(model.device),
            attention_mask=self._mask.to(model.device),
            past_key_values=self._cache,
            max_new_tokens=max(answer.left for answer in self.answers),
            pad_token_id=pad_id(self.pair.receiver),
            logits_processor=LogitsProcessorList([sampler]),
            stopping_criteria=StoppingCriteriaList([_Hand(self.answers, sampler, enough)]),
            **_OPTIONS,
        )
        self._ids = ids.cpu()
        self._mask = pad(self._mask, (0, self._ids.shape[1] - self._mask.shape[1]), value=1)

    def cache_of(self, row: int) -> DynamicCache:
        """A copy of one row's cache: its prompt and what it has written but the last token, without padding."""
        answer, start = self.answers[row], int(self._mask[row].argmax())
        stop = start + len(answer.job.read.ids) + len(answer.written) - 1
        return cut(self._cache, row, start, stop)

    def leave(self) -> None:
        """Drop the rows that are done, and the columns that only they needed."""
        rows = [i for i, answer in enumerate(self.answers) if not answer.done]
        if not rows:
            self.clear()
        elif len(rows) < len(self.answers):
            kv.select_rows(self._cache, rows)
            unused = int(self._mask[rows].any(0).long().argmax())
            self._ids, self._mask = self._ids[rows, unused:], self._mask[rows, unused:]
            for layer in range(len(self._cache.layers)):
                keys, values = kv.layer_tensors(self._cache, layer)
                kv.adopt_layer(self._cache, layer, keys[:, :, unused:], values[:, :, unused:])
            self.answers = [self.answers[i] for i in rows]


def cut(cache: DynamicCache, row: int, start: int, stop: int) -> DynamicCache:
    """A copy of some positions of one row."""
    layers = (kv.layer_tensors(cache, i) for i in range(len(cache.layers)))
    return kv.from_tensors([tuple(x[row, None, :, start:stop].clone() for x in both) for both in layers])  # type: ignore[misc]


class _Hand(StoppingCriteria):
    """Hands each token to the answer that it belongs to, and says when `generate` has to return."""

    def __init__(self, answers: Sequence[Answer], sampler: Sampler, enough: Callable[[int], bool]):
        self._answers, self._sampler, self._enough = answers, sampler, enough
        self._steps = 0

    def __call__(self, input_ids, scores, **kwargs):  # type: ignore[override]
        self._steps += 1
        for answer, drawn in zip(self._answers, self._sampler.drawn, strict=True):
            if not answer.done:
                answer.take(drawn)
        done = [answer.done for answer in self._answers]
        if 2 * sum(done) >= len(done) or self._enough(self._steps):
            done = [True] * len(done)
        return torch.tensor(done, device=input_ids.device)
