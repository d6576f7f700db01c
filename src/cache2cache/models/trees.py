"""Prompts that begin alike, read in one pass: their common beginning once, and behind it the rest of each.

Questions about one passage and the turns of one conversation are such prompts. A tree is one sequence, in which a prompt's
rest sees the beginning and itself, at the positions that it has in the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cache2cache.models import kv
from cache2cache.models.geometry import attention_window
from cache2cache.models.load import LanguageModel
from cache2cache.models.parts import Chosen, Ids, chosen_positions, right_padded

_WORTH = 32
"""Tokens that prompts must have in common."""

_CUT_PROMPTS, _CUT_TOKENS = 16, 4096
"""How large trees become on average where more prompts begin alike: so many prompts, or fewer of so many tokens in all."""


@dataclass(frozen=True)
class Tree:
    """Prompts and how much of their beginning they share."""

    rows: tuple[int, ...]
    """Which prompts."""
    shared: int
    """Tokens; of a prompt alone, all of it."""
    tokens: int
    """Of the whole sequence."""


def alone(prompts: Sequence[Ids]) -> list[Tree]:
    """Each prompt in a tree of its own."""
    return [Tree((i,), len(ids), len(ids)) for i, ids in enumerate(prompts)]


def grow(prompts: Sequence[Ids], keys: Sequence[str]) -> list[Tree]:
    """All prompts in trees, those that begin like no other each in one of its own; by the first prompt of each.

    Prompts of about one length are of one tree if they begin alike by half or more. Whether a prompt begins another tree
    depends on that prompt alone, so that what is left once some trees have been read grows into just the others.

    Args:
        keys: a hexadecimal digest of each prompt.
    """
    read = [tuple(map(int, ids)) for ids in prompts]
    alike: dict[tuple[int, ...], list[list[int]]] = {}
    for i in sorted(range(len(read)), key=lambda i: (read[i], i)):
        ids = read[i]
        if len(ids) < _WORTH:
            alike[(i,)] = [[i]]
            continue
        trees = alike.setdefault(ids[: _half(len(ids))], [])
        if trees and int(keys[i], 16) % max(1, min(_CUT_PROMPTS, _CUT_TOKENS // len(ids))):
            trees[-1].append(i)
        else:
            trees.append([i])
    grown = []
    for rows in (rows for trees in alike.values() for rows in trees):
        start = _common(read[rows[0]], read[rows[-1]])  # in this order, no two have less in common
        grown.append(Tree(tuple(rows), start, start + sum(len(read[i]) - start for i in rows)))
    return sorted(grown, key=lambda tree: min(tree.rows))


def _half(length: int) -> int:
    """Half of a length or somewhat more, the same for lengths that differ by a factor of up to √2."""
    return math.ceil(_WORTH * 2 ** (max(0, math.ceil(2 * math.log2(length / (2 * _WORTH)))) / 2))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Tokens at the beginning of both."""
    return next((n for n, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def readable(lm: LanguageModel, longest: int) -> bool:
    """Whether the model can read trees of prompts of up to this length.

    It must see all of a prompt, and take a mask of its own for each token. Whether it does that is tried out.
    """
    if not sees_all(lm, longest):
        return False
    size = lm.model.config.get_text_config(decoder=True).vocab_size
    prompts = [[(7 * i + j * (i > 3)) % size for i in range(6)] for j in range(2)]
    tree = Tree((0, 1), 4, 8)
    try:
        tried = read(lm, prompts, [tree])
    except (ValueError, TypeError, RuntimeError, NotImplementedError):
        return False
    mask = torch.ones((2, 6), dtype=torch.long, device=lm.device)
    plain = kv.stack(kv.prefill(lm.model, torch.tensor(prompts, device=lm.device), mask)).to("cpu")
    off = (torch.stack(tried, 2).float() - plain.float()).norm() / plain.float().norm()
    return bool(off < torch.finfo(lm.dtype).eps ** 0.75)


def sees_all(lm: LanguageModel, tokens: int) -> bool:
    """Whether the last of so many tokens sees the first in every layer."""
    window = attention_window(lm.model.config)
    return window is None or tokens <= window


def read(
    lm: LanguageModel,
    prompts: Sequence[Ids],
    trees: Sequence[Tree],
    positions: Sequence[Chosen] | None = None,
    layers: Chosen = None,
) -> list[torch.Tensor]:
    """The cache of each prompt, (2, L, H, P, D) on the CPU, all trees read in one batch.

    Args:
        trees: that hold all prompts.
        positions: which ones of each prompt; all by default.
        layers: which ones, in which order; all by default.
    """
    chosen = chosen_positions(prompts, positions)
    width = max(tree.tokens for tree in trees)
    ids, places = torch.zeros((2, len(trees), width), dtype=torch.long)
    branches = torch.full((len(trees), width), -1)  # 0 is the beginning, then one each; −1 is padding
    columns: dict[int, np.ndarray] = {}
    for t, tree in enumerate(trees):
        first, start = prompts[tree.rows[0]], tree.shared
        parts = [(0, 0, first[:start]), *((b, start, prompts[i][start:]) for b, i in enumerate(tree.rows, 1))]
        end = 0
        for branch, place, part in parts:
            here = slice(end, end + len(part))
            ids[t, here] = torch.as_tensor(part)
            places[t, here] = torch.arange(place, place + len(part))
            branches[t, here] = branch
            if branch:
                columns[tree.rows[branch - 1]] = np.concatenate([np.arange(start), np.arange(end, here.stop)])
            end = here.stop
    mask = _mask(branches, lm.dtype)
    cache = kv.prefill_masked(lm.model, ids.to(lm.device), places.to(lm.device), mask.to(lm.device))
    tree_of = {i: t for t, tree in enumerate(trees) for i in tree.rows}
    at = right_padded([columns[i][some] for i, some in enumerate(chosen)]).to(lm.device)
    kept = None if layers is None else list(layers)
    found = kv.gather(cache, at, kept, [tree_of[i] for i in range(len(prompts))]).to("cpu")
    return [found[:, :, i, :, : len(some)].clone() for i, some in enumerate(chosen)]


def _mask(branches: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(B, 1, N, N), added to the attention's scores, of which branch (B, N) each token belongs to."""
    before = torch.ones(branches.shape[1:] * 2, dtype=torch.bool).tril()
    same, beginning = branches[:, :, None] == branches[:, None], (branches == 0)[:, None]
    seen = before & (same | beginning)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[:, None]
