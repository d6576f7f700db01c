"""What a run says of itself at each validation: how likely the responses are, and what the fuser's weights look like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from cache2cache.fuser.base import Fuser
from cache2cache.fuser.gate import KINDS

MEASURES = ("nats", "tokens", "mismatched", "zeroed", "first")
"""What a validation step says of each row, see `TrainingStep.forward`."""

SHOWN = {"eval_loss": "matched", "eval_mismatched": "mismatched", "eval_zeroed": "zeroed", "eval_accuracy": "accuracy"}
"""Which measures people are told, and how they are called."""


def measures(prediction: Any) -> dict[str, float]:
    """Nats per response token, and how often a response's first token is the likeliest, over all rows of a validation.

    Rows weigh as much as they have tokens. `mismatched` and `margin` = mismatched − matched are taken over the rows that had
    another row to hear, and left out if there was none. `loss` takes the place of Trainer's own, a mean of batch means.
    """
    nats, tokens, mismatched, zeroed, first = np.asarray(prediction.predictions, dtype=np.float64).T
    found = {
        "loss": nats.sum() / tokens.sum(),
        "zeroed": zeroed.sum() / tokens.sum(),
        "accuracy": first.mean(),
    }
    paired = np.isfinite(mismatched)
    if paired.any():
        count = tokens[paired].sum()
        found["mismatched"] = mismatched[paired].sum() / count
        found["margin"] = (mismatched - nats)[paired].sum() / count
    return {name: float(value) for name, value in found.items()}


def watched(state: Mapping[str, torch.Tensor], fuser: Fuser) -> dict[str, float]:
    """What a fuser's weights say of a run: how open each gate is, the gates' temperature, the norm of each kind of layer.

    A learned gate with logit a is open for a share 1 − exp(−exp(a)) of the positions: P(a + g > 0) with the standard Gumbel
    draw g of `Gate`, the limit of its soft value as the temperature falls.

    Args:
        state: the fuser's tensors by name.
    """
    norms: dict[str, float] = {}
    for name, _ in fuser.named_parameters():
        if not name.startswith("gate."):
            kind = name.removesuffix(".weight").removesuffix(".bias")
            norms[kind] = norms.get(kind, 0.0) + float(state[name].detach().float().square().sum())
    found = {f"norm/{kind}": math.sqrt(total) for kind, total in norms.items()}
    if fuser.config.gate.learned:
        found["gate/temperature"] = float(fuser.gate.temperature)
        openness = -torch.expm1(-state["gate.logit"].detach().float().exp())
        for kind, layers in zip(KINDS, openness.tolist(), strict=True):
            found |= {f"gate/{kind}_{layer:02d}": share for layer, share in enumerate(layers)}
    return found
