"""One gate for keys and one for values per receiver layer: soft and noisy in training, open or closed in use."""

from __future__ import annotations

import torch
from pydantic import BaseModel, ConfigDict
from torch import nn


class GateConfig(BaseModel):
    """How gates begin and how their temperature falls."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    learned: bool = True
    """False keeps every gate at its initial state, in training too."""
    initial_logit: float = 0.0
    """Above 0 a gate begins open in use."""
    initial_temperature: float = 1.0
    final_temperature: float = 1e-3
    anneal_steps: int = 1929

    def temperature(self, step: int) -> float:
        """Temperature after `step` optimizer steps: init · (final / init) ^ min(step / anneal_steps, 1)."""
        progress = min(step / self.anneal_steps, 1.0)
        return self.initial_temperature * (self.final_temperature / self.initial_temperature) ** progress


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
        self.logit = nn.Parameter(torch.full((2, layers), config.initial_logit), requires_grad=config.learned)
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
