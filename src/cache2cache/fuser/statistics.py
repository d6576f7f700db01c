"""Mean and covariance of a model's cache features: what a cache looks like that knows nothing of its prompt."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property

import torch

from cache2cache.errors import DataError
from cache2cache.fuser.rotary import Rotary
from cache2cache.types import Geometry


@dataclass(frozen=True)
class FeatureStatistics:
    """Moments of one position's F = H · D features, per kind (keys, values) and layer, in float64 on the CPU.

    Keys are taken at position 0, as `CompactFuser` takes them; those of models whose keys cannot be rotated back (no
    `Geometry.rope_of_layer`) as they are, and then they are not rotated to other positions either.
    """

    geometry: Geometry
    mean: torch.Tensor
    """(2, L, F)"""
    covariance: torch.Tensor
    """(2, L, F, F), unbiased; zero if there was one position only."""
    count: int
    """Positions that the moments were taken over."""

    @classmethod
    def of(
        cls, geometry: Geometry, caches: Iterable[torch.Tensor], positions: Iterable[torch.Tensor]
    ) -> FeatureStatistics:
        """The moments of a sample of caches, which are read once and one at a time.

        Args:
            caches: (2, L, H, n, D) each, of any float dtype; n may differ, and positions may be left out of a cache.
            positions: (n,) each, the position ids at which the tokens stood.

        Raises:
            DataError: no position at all, shapes that are not the model's, or features that are not finite.
        """
        rotary = _rotary(geometry)
        size = geometry.features
        count = 0
        mean = torch.zeros((2, geometry.layers, size), dtype=torch.float64)
        scatter = torch.zeros((2, geometry.layers, size, size), dtype=torch.float64)
        for cache, at in zip(caches, positions, strict=True):
            new = len(at)
            x = _features(_checked(cache, at, geometry), at, rotary)
            if new == 0:
                continue
            # Chan, Golub, LeVeque (1983): merging the moments of two samples, without the cancellation that sums of
            # squares suffer where a feature's mean is many times its deviation.
            own = x.mean(-2)
            centred, shift = x - own[:, :, None], own - mean
            scatter += centred.mT @ centred + shift[..., None] * shift[..., None, :] * (count * new / (count + new))
            mean += shift * (new / (count + new))
            count += new
        if count == 0:
            raise DataError("no statistics without a sample", got="0 positions", allowed="at least one position")
        return cls(geometry, mean, scatter / max(count - 1, 1), count)

    def mean_cache(self, positions: torch.Tensor) -> torch.Tensor:
        """The mean features at each position.

        Args:
            positions: (n,) position ids.
        Returns:
            (2, L, H, n, D) float32, on the device of the positions.
        """
        return self._cache(self.mean[:, :, None].expand(-1, -1, len(positions), -1), positions)

    def noise_cache(self, positions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """Features from the normal distribution with this mean and covariance, independent between positions,
        layers, keys and values.

        Args:
            positions: (n,) position ids.
            generator: where the randomness comes from; the same state gives the same cache.
        Returns:
            (2, L, H, n, D) float32, on the device of the positions.
        """
        shape = (*self.mean.shape[:2], len(positions), self.mean.shape[2])
        normal = torch.randn(shape, generator=generator, device=generator.device).to("cpu", torch.float64)
        return self._cache(self.mean[:, :, None] + normal @ self._root, positions)

    @cached_property
    def _root(self) -> torch.Tensor:
        """(2, L, F, F) symmetric square root of the covariance.

        Not Cholesky, which a singular covariance does not have, and not V √w, which depends on the signs that a
        solver happens to give to eigenvectors.
        """
        values, vectors = torch.linalg.eigh(self.covariance)
        # Rounding makes some of the zero eigenvalues of a small sample negative.
        return (vectors * values.clamp(min=0).sqrt()[..., None, :]) @ vectors.mT

    def _cache(self, features: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """(2, L, n, F) features at position 0 → a cache (2, L, H, n, D) at the given positions."""
        heads = (self.geometry.kv_heads, self.geometry.head_dim)
        cache = features.to(positions.device, torch.float32).unflatten(-1, heads).transpose(2, 3)
        return _rotated(cache, positions, _rotary(self.geometry), back=False)


def _rotary(geometry: Geometry) -> Rotary | None:
    return Rotary(geometry) if geometry.rope_of_layer else None


def _rotated(cache: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None, *, back: bool) -> torch.Tensor:
    """The cache (2, L, H, n, D) with its keys rotated; as it is if they cannot be."""
    if rotary is None:
        return cache.contiguous()
    keys, values = cache
    entries = torch.arange(len(keys))
    return torch.stack([rotary(keys[:, None], positions[None], entries, back=back)[:, 0], values])


def _features(cache: torch.Tensor, positions: torch.Tensor, rotary: Rotary | None) -> torch.Tensor:
    """(2, L, H, n, D) → (2, L, n, F) float64 on the CPU, keys rotated back to position 0."""
    still = _rotated(cache.float(), positions.to(cache.device), rotary, back=True)
    return still.to("cpu", torch.float64).transpose(2, 3).flatten(-2)


def _checked(cache: torch.Tensor, positions: torch.Tensor, geometry: Geometry) -> torch.Tensor:
    expected = (2, geometry.layers, geometry.kv_heads, len(positions), geometry.head_dim)
    if tuple(cache.shape) != expected:
        raise DataError("a cache of another shape than the model's", got=tuple(cache.shape), allowed=expected)
    if not cache.isfinite().all():
        raise DataError("a cache with features that are not finite", hint="Compute its prefill again, in float32")
    return cache
