import pytest
import torch

from cache2cache.errors import DataError
from cache2cache.fuser.rotary import Rotary
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.models import kv
from cache2cache.testing import FAMILIES, tiny_model
from cache2cache.types import Geometry, Rope

LAYERS, HEADS, DIM = 2, 2, 8
FULL = Rope(inv_freq=(1.0, 0.1, 0.01, 0.001), scaling=1.2)


def geometry(*ropes: Rope) -> Geometry:
    of_layer = tuple(layer % len(ropes) for layer in range(LAYERS)) if ropes else ()
    return Geometry(
        layers=LAYERS,
        kv_heads=HEADS,
        head_dim=DIM,
        vocab_size=None,
        max_positions=None,
        ropes=ropes,
        rope_of_layer=of_layer,
        rope_problem=None if ropes else "positions are learned",
    )


GEOMETRIES = {
    "rotary": geometry(FULL),
    "two kinds": geometry(FULL, Rope(inv_freq=(0.5, 0.25, 0.125, 0.0625))),
    "partial": geometry(Rope(inv_freq=(1.0, 0.01))),
    "none": geometry(),
}
EACH = pytest.mark.parametrize("size", GEOMETRIES.values(), ids=GEOMETRIES)


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def still(*lengths: int) -> list[torch.Tensor]:
    """Correlated features with large means, at position 0: (2, L, H, n, D) each."""
    mean = 20 * torch.randn(2, LAYERS, 1, HEADS * DIM, generator=rng(1))
    mix = torch.randn(2, LAYERS, HEADS * DIM, HEADS * DIM, generator=rng(2))
    return [
        (mean + torch.randn(2, LAYERS, n, HEADS * DIM, generator=rng(3 + i)) @ mix)
        .unflatten(-1, (HEADS, DIM))
        .transpose(2, 3)
        for i, n in enumerate(lengths)
    ]


def placed(cache: torch.Tensor, positions: torch.Tensor, size: Geometry, *, back: bool = False) -> torch.Tensor:
    """The cache with its keys rotated to the positions, or back from them."""
    if not size.rope_of_layer:
        return cache
    keys = Rotary(size)(cache[0][:, None], positions[None], torch.arange(LAYERS), back=back)[:, 0]
    return torch.stack([keys, cache[1]])


def flat(caches: list[torch.Tensor]) -> torch.Tensor:
    """(2, L, n, F) of all caches together."""
    return torch.cat([cache.transpose(2, 3).flatten(-2) for cache in caches], dim=2).double()


def covariance(x: torch.Tensor) -> torch.Tensor:
    """(2, L, F, F), by numpy's formula."""
    return torch.stack([torch.stack([torch.cov(layer.T) for layer in side]) for side in x])


def sample(size: Geometry, *lengths: int) -> tuple[list[torch.Tensor], list[torch.Tensor], list[torch.Tensor]]:
    """Features at position 0, the caches that hold them at other positions, and those positions."""
    features = still(*lengths)
    positions = [torch.arange(n) * 3 + 7 * i for i, n in enumerate(lengths)]
    return features, [placed(f, p, size) for f, p in zip(features, positions, strict=True)], positions


@EACH
def test_moments_are_those_of_the_features_at_position_0(size):
    features, caches, positions = sample(size, 30, 1, 0, 50)
    got = FeatureStatistics.of(size, caches, positions)
    assert got.count == 81
    torch.testing.assert_close(got.mean, flat(features).mean(2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.covariance, covariance(flat(features)), rtol=1e-3, atol=1e-2)


@EACH
def test_mean_cache_is_the_mean_at_every_position(size):
    _, caches, positions = sample(size, 40)
    statistics = FeatureStatistics.of(size, caches, positions)
    at = torch.tensor([5, 0, 700])
    got = statistics.mean_cache(at)
    assert got.shape == (2, LAYERS, HEADS, 3, DIM) and got.dtype == torch.float32
    back = flat([placed(got, at, size, back=True)])
    torch.testing.assert_close(back, statistics.mean[:, :, None].expand_as(back), rtol=1e-4, atol=1e-3)
    moved = not torch.allclose(got[0, :, :, 0], got[0, :, :, 2], atol=1e-2)
    assert moved == bool(size.rope_of_layer), "keys, and only keys that are rotated, depend on the position"
    assert torch.equal(got[1, :, :, 0], got[1, :, :, 2])


@EACH
def test_noise_has_the_moments_of_the_sample(size):
    _, caches, positions = sample(size, 200)
    statistics = FeatureStatistics.of(size, caches, positions)
    at = torch.arange(20_000) % 500
    drawn = flat([placed(statistics.noise_cache(at, rng()), at, size, back=True)])
    scale = statistics.covariance.diagonal(dim1=-2, dim2=-1).sqrt()
    off = (drawn.mean(2) - statistics.mean) / scale
    assert off.abs().max() < 0.05  # standard error 0.007
    correlation = (covariance(drawn) - statistics.covariance) / (scale[..., None] * scale[..., None, :])
    assert correlation.abs().max() < 0.06


def test_noise_is_independent_between_positions_layers_and_kinds():
    size = GEOMETRIES["none"]
    _, caches, positions = sample(size, 200)
    statistics = FeatureStatistics.of(size, caches, positions)
    drawn = flat([statistics.noise_cache(torch.arange(20_000), rng())])
    alike = (drawn - drawn.mean(2, keepdim=True)) / drawn.std(2, keepdim=True)
    pairs = {
        "positions": alike[:, :, 1:] * alike[:, :, :-1],
        "layers": alike[:, 0] * alike[:, 1],
        "kinds": alike[0] * alike[1],
    }
    for name, product in pairs.items():
        assert product.mean(-2).abs().max() < 0.05, name


def test_noise_is_the_generators():
    size = GEOMETRIES["rotary"]
    _, caches, positions = sample(size, 30)
    statistics, again = (FeatureStatistics.of(size, caches, positions) for _ in range(2))
    at, generator = torch.arange(6), rng(5)
    first, second = statistics.noise_cache(at, generator), statistics.noise_cache(at, generator)
    assert torch.equal(first, again.noise_cache(at, rng(5)))
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    statistics.noise_cache(at, rng(6))
    assert torch.equal(torch.get_rng_state(), state), "the global generator is not ours to use"


def test_few_positions_leave_noise_in_the_span_of_the_sample():
    """With fewer positions than features the covariance is singular; noise stays where the sample was."""
    size = GEOMETRIES["none"]
    features, caches, positions = sample(size, 5)
    drawn = FeatureStatistics.of(size, caches, positions).noise_cache(torch.arange(50), rng())
    assert drawn.isfinite().all() and drawn.std() > 0
    centred = flat(features) - flat(features).mean(2, keepdim=True)
    away = flat([drawn]) - flat(features).mean(2, keepdim=True)
    projected = away @ torch.linalg.pinv(centred, rtol=1e-4) @ centred
    torch.testing.assert_close(projected, away, rtol=1e-3, atol=1e-2)


@EACH
def test_one_position_has_no_noise(size):
    _, caches, positions = sample(size, 1)
    statistics = FeatureStatistics.of(size, caches, positions)
    assert not statistics.covariance.any()
    at = torch.tensor([0, 9])
    assert torch.equal(statistics.noise_cache(at, rng()), statistics.mean_cache(at))
    torch.testing.assert_close(statistics.mean_cache(positions[0]), caches[0], rtol=1e-4, atol=1e-3)


def test_bf16_caches_are_measured_in_full_precision():
    size = GEOMETRIES["rotary"]
    _, caches, positions = sample(size, 60)
    rounded = [cache.bfloat16() for cache in caches]
    got = FeatureStatistics.of(size, rounded, positions)
    want = FeatureStatistics.of(size, [cache.float() for cache in rounded], positions)
    assert torch.equal(got.mean, want.mean) and torch.equal(got.covariance, want.covariance)
    assert got.mean_cache(positions[0]).dtype == torch.float32


def test_any_grouping_of_the_sample_gives_the_same_moments():
    size = GEOMETRIES["rotary"]
    _, caches, positions = sample(size, 24)
    whole = FeatureStatistics.of(size, caches, positions)
    parts = FeatureStatistics.of(size, iter(caches[0].split([3, 20, 1], dim=3)), iter(positions[0].split([3, 20, 1])))
    torch.testing.assert_close(whole.mean, parts.mean)
    torch.testing.assert_close(whole.covariance, parts.covariance)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_token_alone_gives_the_features_it_gives_anywhere(family):
    """Models with rotary keys: what one token is cached as, read at position 9, is rotated back to position 0."""
    lm = tiny_model(family)
    size = lm.card.geometry
    ids = torch.tensor([[5]])
    here = kv.stack(kv.prefill(lm.model, ids, torch.ones_like(ids)))[:, :, 0]
    there = kv.new_cache()
    at = torch.tensor([9])
    lm.model(input_ids=ids, position_ids=at[None], past_key_values=there)
    statistics = FeatureStatistics.of(size, [kv.stack(there)[:, :, 0]], [at])
    if size.rope_problem is None:
        torch.testing.assert_close(statistics.mean_cache(torch.tensor([0])), here, rtol=1e-3, atol=1e-4)
    else:
        torch.testing.assert_close(statistics.mean_cache(torch.tensor([0])), kv.stack(there)[:, :, 0])


def test_bad_samples_are_refused():
    size = GEOMETRIES["rotary"]
    _, caches, positions = sample(size, 4)
    broken = caches[0].clone()
    broken[1, 0, 0, 2, 3] = float("nan")
    for bad, at, message in (
        ([], [], "without a sample"),
        ([caches[0][:, :, :, :0]], [positions[0][:0]], "without a sample"),
        (caches, [positions[0][:3]], "another shape"),
        ([caches[0][:, :1]], positions, "another shape"),
        ([broken], positions, "not finite"),
    ):
        with pytest.raises(DataError, match=message):
            FeatureStatistics.of(size, bad, at)
    with pytest.raises(ValueError, match="shorter|longer"):
        FeatureStatistics.of(size, caches, [])
