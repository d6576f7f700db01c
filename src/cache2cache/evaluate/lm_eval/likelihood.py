"""How likely the receiver holds continuations of a context, on the fused cache."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache2cache import inputs
from cache2cache.errors import DataError
from cache2cache.evaluate.lm_eval.contexts import Reader
from cache2cache.inputs import Row
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C

Scored = tuple[float, bool]
"""Log-likelihood in nats, and whether greedy decoding would have written the same."""


@dataclass(frozen=True)
class Context:
    """A context and everything that is to be scored behind it."""

    row: Row
    space: int
    """How many of the row's last tokens are white space that is read as the prompt's end, and scored nevertheless."""
    tails: Mapping[int, list[int]]
    """By request: the row's last token and the tokens behind it."""


def prepare(reader: Reader, context: str, ids: Sequence[int], continuations: Mapping[int, Sequence[int]]) -> Context:
    """What is read once for all continuations of a context.

    hf counts the white space at the end of a context to the continuation. Chat prompts end so (`assistant⏎`), and
    must still be read and fused as a whole: what the fuser was trained for is an answer behind the whole prompt.

    Args:
        ids: the context in hf's tokens.
        continuations: by request, in hf's tokens.

    Raises:
        ContextLengthError: longer than the receiver's context.
        DataError: nothing to be read, or nothing to be scored.
    """
    if not ids or not all(continuations.values()):
        raise DataError("context and continuation must have tokens", got=repr(context))
    whole = {request: [*ids, *continuation] for request, continuation in continuations.items()}
    inputs.check_length(reader.pair.receiver, len(ids), max(map(len, continuations.values())) - 1)
    if len(ids) == 1:  # as hf's token in place of an empty context: the last one is never fused
        row = Row(np.array(ids), (None,) * len(reader.pair.sharers))
    else:
        prompt = reader.prompt(context, strip=True)
        # As far as all continuations begin with the rest of the prompt, and leave something to be scored behind it.
        stop = max(len(ids), min(prompt.covers(tokens[:-1]) for tokens in whole.values()))
        row = prompt.fitted(next(iter(whole.values()))[:stop])
    size = len(row.ids)
    return Context(row, size - len(ids), {request: tokens[size - 1 :] for request, tokens in whole.items()})


def scores(pair: C2C, contexts: Sequence[Context], batch_size: int) -> Iterator[tuple[int, Scored]]:
    """Read and fuse all contexts as one batch; request and answer for each of their tails.

    Args:
        contexts: with the same number of `space` tokens.
        batch_size: most tails at once.
    """
    prefill = pair.read(pair.collate([c.row for c in contexts]))
    cache = kv.stack(prefill.cache) if kv.length(prefill.cache) else None
    mask, space = prefill.mask[:, :-1], contexts[0].space
    spaces: list[Scored] = [(0.0, True)] * len(contexts)
    if space:
        assert cache is not None, "white space stands behind at least one token"
        ends = [c.row.ids[-space - 1 :].tolist() for c in contexts]
        spaces = _score(pair.receiver, cache[..., :-space, :], mask[:, :-space], range(len(ends)), ends)
    asked = [(b, request, tail) for b, c in enumerate(contexts) for request, tail in c.tails.items()]
    for at in range(0, len(asked), batch_size):
        rows, requests, tails = zip(*asked[at : at + batch_size], strict=True)
        found = _score(pair.receiver, cache, mask, rows, tails)
        for b, request, (nats, greedy) in zip(rows, requests, found, strict=True):
            yield request, (spaces[b][0] + nats, spaces[b][1] and greedy)


@torch.no_grad()
def _score(
    lm: LanguageModel,
    cache: torch.Tensor | None,
    mask: torch.Tensor,
    rows: Sequence[int],
    tails: Sequence[Sequence[int]],
) -> list[Scored]:
    """Score all tokens of each tail but the first, which is read.

    Args:
        cache: (2, L_r, B, H_r, N, D_r) keys and values, fused; None where N is 0. It stays as it is.
        mask: (B, N)
        rows: the row of the cache that each tail stands behind.
    """
    read, real = torch.zeros((2, len(tails), max(map(len, tails)) - 1), dtype=torch.long)
    for b, tail in enumerate(tails):
        read[b, : len(tail) - 1] = torch.tensor(tail[:-1])
        real[b, : len(tail) - 1] = 1
    seen = torch.cat([mask[list(rows)].to(real), real], dim=1).to(lm.device)
    held = kv.new_cache() if cache is None else kv.from_tensors(list(zip(*cache[:, :, list(rows)], strict=True)))
    logits = lm.model(
        input_ids=read.to(lm.device),
        attention_mask=seen,
        position_ids=kv.position_ids(seen)[:, -read.shape[1] :],
        past_key_values=held,
        use_cache=True,
    ).logits
    found = []
    for row, tail in zip(logits.float().log_softmax(-1), tails, strict=True):  # (n, V)
        wanted = torch.tensor(tail[1:], device=lm.device)
        row = row[: len(wanted)]
        nats = row.gather(1, wanted[:, None]).sum()
        found.append((float(nats), bool((row.argmax(-1) == wanted).all())))
    return found
