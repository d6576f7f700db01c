"""Prompts that begin alike, read in one pass: their common beginning once, and behind it the rest of each.

Questions about one passage and the turns of one conversation are such prompts. A tree is one sequence, in which a prompt's
rest sees the beginning and itself, at the positions that it has in the prompt.
"""

from __future__ import annotations

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

_CUT = 16
"""Prompts of a tree, on average, where more of them begin alike."""


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

    Where a tree ends depends on its own prompts alone, so that what is left once some trees have been read grows into just
    the others.

    Args:
        keys: a hexadecimal digest of each prompt.
    """
    read = [tuple(map(int, ids)) for ids in prompts]
    order = sorted(range(len(read)), key=lambda i: (read[i], i))
    trees: list[list[int]] = []
    shared: list[int] = []
    for at, i in enumerate(order):
        before = order[max(0, at - 1)]
        common = _common(read[before], read[i])
        worth = common >= max(_WORTH, len(read[i]) / 2, len(read[before]) / 2)
        if at and worth and int(keys[before], 16) % _CUT:
            trees[-1].append(i)
            shared[-1] = min(shared[-1], common)
        else:
            trees.append([i])
            shared.append(len(read[i]))
    grown = [
        Tree(tuple(rows), start, start + sum(len(read[i]) - start for i in rows))
        for rows, start in zip(trees, shared, strict=True)
    ]
    return sorted(grown, key=lambda tree: min(tree.rows))


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
