"""What is minimised, term by term. Knows logits and tokens, not how they came about."""

from __future__ import annotations

import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

_AT_ONCE = 256
"""Positions whose logits are held in float32 at one time."""


def nats(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of each label.

    Args:
        logits: (K, V), of any float dtype.
        labels: (K,) token ids.
    Returns:
        (K,) float32.
    """

    def some(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        return functional.cross_entropy(logits.float(), labels, reduction="none")

    # In float32, and with them their softmax, all logits of a batch would be what takes most memory in a step.
    parts = zip(logits.split(_AT_ONCE), labels.split(_AT_ONCE), strict=True)
    return torch.cat([checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])  # type: ignore[misc]


def departure(logits: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
    """How far a model has gone from what it says alone, over all tokens: KL(alone ‖ model) = Σ p · (log p − log q).

    Args:
        logits, alone: (K, V), of any float dtype; gradients flow to the first.
    Returns:
        (K,) float32.
    """

    def some(logits: torch.Tensor, alone: torch.Tensor) -> torch.Tensor:
        here, there = logits.float().log_softmax(1), alone.float().log_softmax(1)
        return functional.kl_div(here, there, reduction="none", log_target=True).sum(1)

    parts = zip(logits.split(_AT_ONCE), alone.split(_AT_ONCE), strict=True)
    return torch.cat([checkpoint(some, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])  # type: ignore[misc]


def divergence(logits: torch.Tensor, ids: torch.Tensor, logprobs: torch.Tensor) -> torch.Tensor:
    """KL(teacher ‖ model) over the teacher's tokens, both distributions normalised over them: Σ p · (log p − log q).

    Args:
        logits: (K, V)
        ids: (K, k) the tokens, see `batch.Teacher`.
        logprobs: (K, k) log p, −inf where there is no token.
    Returns:
        (K,) float32, zero where the teacher says nothing.
    """
    known = logprobs.isfinite()
    ours = logits.gather(1, ids).float().masked_fill(~known, torch.finfo(torch.float32).min)
    terms = logprobs.exp() * (logprobs.masked_fill(~known, 0) - ours.log_softmax(1))
    return terms.masked_fill(~known, 0).sum(1)


def hinge(matched: torch.Tensor, mismatched: torch.Tensor, tokens: torch.Tensor, margin: float) -> torch.Tensor:
    """How much a row's response is too likely with another row's cache: tokens · max(0, margin − (mismatched − matched)).

    Args:
        matched, mismatched: (B,) nats of the response, summed over its tokens.
        tokens: (B,) how many those are.
        margin: nats per token.
    Returns:
        (B,) nats, summed over the tokens as the other terms are.
    """
    return (margin * tokens - (mismatched - matched)).clamp(min=0)
