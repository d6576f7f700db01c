"""Drawing tokens: each row of a batch by its own rules, from its own random numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import LogitsProcessor

from cache2cache.errors import RequestError
from cache2cache.serve.engine import Sampling

MAX_LOGPROBS = 20
"""Most alternatives that can be asked for, as at OpenAI."""

_COLDEST = 1e-6
"""Lowest temperature but 0: far below it, a quotient of float32 numbers is not a number."""


def check(sampling: Sampling) -> None:
    """Raise RequestError unless every option is within its range."""
    cold = sampling.temperature == 0 or _COLDEST <= sampling.temperature < math.inf
    for name, fits, allowed in (
        ("max_tokens", sampling.max_tokens is None or sampling.max_tokens >= 1, "1 and more"),
        ("temperature", cold, f"0, or {_COLDEST} and more"),
        ("top_p", 0 < sampling.top_p <= 1, "above 0, up to 1"),
        ("seed", -(2**63) <= sampling.seed < 2**63, "64 bits, signed"),
        ("stop", all(sampling.stop), "texts that are not empty"),
        ("logprobs", sampling.logprobs is None or 0 <= sampling.logprobs <= MAX_LOGPROBS, f"0–{MAX_LOGPROBS}"),
    ):
        if not fits:
            raise RequestError(f"{name} is out of range", got=getattr(sampling, name), allowed=allowed, field=name)


@dataclass(frozen=True)
class Drawn:
    """One row's token at one step."""

    token: int | None
    """None if the model computed numbers that are none."""
    logprob: float | None = None
    """After temperature, before top_p; only where it was asked for, as are the likeliest tokens and theirs in `top`."""
    top: tuple[tuple[int, float], ...] = ()


class Draw:
    """One row's rules, and the state of its random numbers: one set for each token, whatever else is in the batch."""

    def __init__(self, sampling: Sampling):
        self._sampling = sampling
        self._random = torch.Generator().manual_seed(sampling.seed)

    def __call__(self, scores: torch.Tensor) -> Drawn:
        """The next token.

        Args:
            scores: (V,) float32 logits.
        """
        if scores.isnan().any():
            return Drawn(None)
        temperature, wanted = self._sampling.temperature, self._sampling.logprobs
        if temperature == 0 and wanted is None:
            return Drawn(int(scores.argmax()))
        logprobs = ((scores - scores.max()) / (temperature or 1.0)).log_softmax(-1)
        token = int((self._noisy(logprobs) if temperature else scores).argmax())
        if wanted is None:
            return Drawn(token)
        top = logprobs.topk(min(wanted, len(logprobs)))
        likeliest = tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True))
        return Drawn(token, float(logprobs[token]), likeliest)

    def _noisy(self, logprobs: torch.Tensor) -> torch.Tensor:
        """(V,) log-probabilities of the nucleus plus Gumbel noise: the largest is a draw from their distribution."""
        if self._sampling.top_p < 1:
            ordered, order = logprobs.sort(descending=True, stable=True)
            before = ordered.exp().cumsum(0) - ordered.exp()
            logprobs = logprobs.index_fill(0, order[before >= self._sampling.top_p], -math.inf)
        # Drawn on the CPU, so that a seed means the same on every device.
        noise = torch.empty(len(logprobs)).exponential_(generator=self._random)
        return logprobs - noise.log().to(logprobs.device)


class Sampler(LogitsProcessor):
    """Draws for every row of a batch, and leaves `generate`, which takes the likeliest token, no other choice."""

    def __init__(self, draws: Sequence[Draw]):
        self._draws = draws
        self.drawn: list[Drawn] = []
        """Of the last step, one per row."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
        self.drawn = [draw(row) for draw, row in zip(self._draws, scores, strict=True)]
        chosen = torch.tensor([[drawn.token or 0] for drawn in self.drawn], device=scores.device)
        return torch.full_like(scores, -math.inf).scatter_(1, chosen, 0.0)
