"""One gate for keys and one for values per receiver layer: soft and noisy in training, open or closed in use."""

from __future__ import annotations

from typing import Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import nn

Kind = Literal["keys", "values"]
KINDS: tuple[Kind, ...] = ("keys", "values")
"""In the order of the first dimension of a stacked cache."""


class GateConfig(BaseModel):
    """How gates begin, which of them may open, and how their temperature falls."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    learned: bool = True
    """False keeps every gate at its initial state, in training too."""
    initial_logit: float = 0.0
    """Above 0 a gate begins open in use."""
    initial_temperature: float = Field(default=1.0, gt=0)
    final_temperature: float = Field(default=1e-3, gt=0)
    anneal_steps: int = Field(default=1929, gt=0)
    schedule: Literal["exponential", "linear"] = "exponential"
    """How the temperature falls. The paper says linearly, the published code does it exponentially."""
    kinds: tuple[Kind, ...] = Field(default=KINDS, min_length=1)
    """What of the receiver's cache may be fused; only without learned gates. All other gates are closed for good: their
    entries are not computed and learn nothing."""
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """The receiver's layers that may be fused, all by default; as for `kinds`."""

    @model_validator(mode="after")
    def _fixed(self) -> Self:
        chosen = self.layers is not None or set(self.kinds) != set(KINDS)
        if chosen and self.learned:
            raise ValueError("kinds and layers choose gates by hand, which needs learned = false")
        if chosen and self.initial_logit <= 0:
            raise ValueError("kinds and layers name gates that are open, which needs an initial_logit above 0")
        return self

    def temperature(self, step: int) -> float:
        """Temperature after `step` optimizer steps, with p = min(step / anneal_steps, 1).

        exponential: init · (final / init) ^ p. linear: init + p · (final − init).
        """
        progress = min(step / self.anneal_steps, 1.0)
        if self.schedule == "linear":
            return self.initial_temperature + progress * (self.final_temperature - self.initial_temperature)
        return self.initial_temperature * (self.final_temperature / self.initial_temperature) ** progress

    def logits(self, layers: int) -> list[list[float]]:
        """Initial logits of keys and of values, by receiver layer."""
        opened = range(layers) if self.layers is None else self.layers
        return [
            [
                self.initial_logit if kind in self.kinds and layer in opened else -self.initial_logit
                for layer in range(layers)
            ]
            for kind in KINDS
        ]


class Gate(nn.Module):
    """Gates of all layer fusers.

    In training: sigmoid((logit + g) / temperature) with one Gumbel draw g = −log(−log(u)) per row, head and
    position, as the published code does. It is not zero-mean: a logit of 0 is open about 1 − 1/e of the time.
    In use: open if logit > 0.
    """

    temperature: torch.Tensor

    def __init__(self, config: GateConfig, layers: int):
        super().__init__()
        self.config = config
        self.logit = nn.Parameter(torch.tensor(config.logits(layers)), requires_grad=config.learned)
        self.register_buffer("temperature", torch.tensor(config.initial_temperature, device="cpu"), persistent=False)

    def anneal(self, step: int) -> None:
        """Set the temperature for the step after `step` optimizer steps."""
        self.temperature.fill_(self.config.temperature(step))

    def open(self) -> torch.Tensor:
        """Entries (kind · L + layer) whose gate is open in use, (E,) int64."""
        return (self.logit.detach().flatten() > 0).nonzero().squeeze(-1)

    def sample(self, noise: torch.Tensor) -> torch.Tensor:
        """Soft gates for training.

        Args:
            noise: (2 · L, B, H_r, P, 1), uniform in [0, 1).
        """
        gumbel = -torch.log(-torch.log(noise + 1e-20) + 1e-20)
        return torch.sigmoid((self.logit.view(-1, 1, 1, 1, 1) + gumbel) / self.temperature)
