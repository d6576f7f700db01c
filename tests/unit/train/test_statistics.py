"""What is measured before the first step: the fused positions, of the mapped layers, whether they were stored or not."""

import pytest
import torch

from cache2cache import C2C
from cache2cache.errors import ModelError
from cache2cache.models import kv
from cache2cache.testing import random_fuser, tiny_model
from cache2cache.train.batch import Example
from cache2cache.train.features import FeatureDataset
from cache2cache.train.rows import train_rows
from cache2cache.train.statistics import (
    STATISTICS_ROWS,
    check_rotations,
    measured_rows,
    sample,
    sharer_statistics,
    spread,
    standardise,
)

WORDS = ("what color", "the question and the answer", "12 == what letter")


def pair_of(receiver, sharer, **config) -> C2C:
    return C2C(receiver, [sharer], [random_fuser(receiver, sharer, **config)])


def rows_of(c2c):
    examples = [Example([{"role": "user", "content": text}], "yes", text, text) for text in WORDS]
    return train_rows(examples, c2c)[0]


@pytest.mark.parametrize("layer_map", [(2, 0), (1, 1)])
def test_the_statistics_are_those_of_the_fused_positions_of_the_mapped_layers(receiver, sharer, layer_map):
    """A compact fuser keeps the same means."""
    c2c = pair_of(receiver, sharer, fuse_last=5, layer_map=layer_map)
    (fuser,) = c2c.fusers
    found = sample(list(FeatureDataset(rows_of(c2c), c2c, None)), c2c)
    standardise(fuser, found)
    statistics = sharer_statistics(c2c, found)
    layers = sorted(set(layer_map))
    assert statistics.count == len(WORDS) * 5 and statistics.mean.shape[1] == len(layers)
    mean = statistics.mean[:, [layers.index(layer) for layer in layer_map]].float()
    torch.testing.assert_close(mean, fuser.other_mean[:, :, 0], rtol=1e-4, atol=1e-4)


def test_the_sample_is_what_the_request_path_fuses(receiver, sharer):
    c2c = pair_of(receiver, sharer, fuse_last=5)
    rows = rows_of(c2c)
    found = sample(list(FeatureDataset(rows[:1], c2c, None)), c2c)
    ids = torch.as_tensor(rows[0].row.ids)[None]
    own = kv.stack(kv.prefill(receiver.model, ids, torch.ones_like(ids)))[:, :, 0]
    assert found.own_positions.tolist() == list(range(ids.shape[1] - 6, ids.shape[1] - 1))
    torch.testing.assert_close(found.own, own[:, :, :, -6:-1], rtol=1e-4, atol=1e-4)
    their_ids = torch.as_tensor(rows[0].row.sharers[0].ids)[None]
    theirs = kv.stack(kv.prefill(sharer.model, their_ids, torch.ones_like(their_ids)))[:, :, 0]
    assert found.their_positions[-1] == their_ids.shape[1] - 1
    torch.testing.assert_close(found.theirs, theirs[:, -2:, :, -5:], rtol=1e-4, atol=1e-4)


def test_of_many_positions_some_are_measured_of_every_row(receiver, sharer, monkeypatch):
    c2c = pair_of(receiver, sharer)
    rows = rows_of(c2c)
    items = list(FeatureDataset(rows, c2c, None))
    whole, total = sample(items, c2c), sum(len(row.heard) for row in rows)
    monkeypatch.setattr("cache2cache.train.statistics._POSITIONS", total // 3)
    assert measured_rows(rows) == 1
    some = sample(items, c2c)
    assert len(some.own_positions) == len(some.their_positions) <= total // 3 + len(rows)
    ends = [int(row.heard[-1]) for row in rows]
    assert set(ends) <= set(some.own_positions.tolist()) <= set(whole.own_positions.tolist())


@pytest.mark.parametrize("config", [{}, {"fuse_last": 3}, {"alignment": "retokenise-longest"}])
def test_features_that_are_stored_give_the_same_sample(receiver, sharer, tmp_path, config):
    c2c = pair_of(receiver, sharer, **config)
    rows = rows_of(c2c)
    live, stored = (sample(list(FeatureDataset(rows, c2c, folder)), c2c) for folder in (None, tmp_path))
    for name, tensor in vars(live).items():
        torch.testing.assert_close(getattr(stored, name), tensor, rtol=1e-4, atol=1e-4)


def test_of_the_receiver_only_what_is_clean_counts(receiver, sharer):
    """A later message is read over a fused cache, so what it will look like is not known yet."""
    c2c = pair_of(receiver, sharer, alignment="retokenise-first")
    turns = [{"role": role, "content": "what color"} for role in ("user", "assistant", "user")]
    rows, _ = train_rows([Example(turns, "yes", "", "")], c2c)
    found = sample(list(FeatureDataset(rows, c2c, None)), c2c)
    assert found.own_positions.tolist() == [x for x in rows[0].heard if x < rows[0].first_stop]
    assert found.own.shape[3] < found.theirs.shape[3] == len(rows[0].heard)


_ROPE = {"rope_type": "default", "rope_theta": 10000.0}


@pytest.mark.parametrize("changed", [{"model_type": "cohere"}, {"model_type": "smollm3", "num_hidden_layers": 4}])
def test_keys_that_cannot_be_rotated_back_are_refused_by_fusers_that_do_so_and_taken_as_they_are_by_others(
    receiver, changed
):
    """Interleaved pairs, and a layer without any."""
    odd = tiny_model("llama", rope_parameters=_ROPE, **changed)
    with pytest.raises(ModelError, match="still_keys = false"):
        check_rotations(pair_of(receiver, odd))
    with pytest.raises(ModelError, match="still_keys = false"):
        check_rotations(pair_of(odd, receiver))
    for config in ({"kind": "paper"}, {"sizes": {"width": 8, "still_keys": False}}):
        for two in ((receiver, odd), (odd, receiver)):
            check_rotations(pair_of(*two, **config))
        c2c = pair_of(receiver, odd, **config)
        found = sample(list(FeatureDataset(rows_of(c2c), c2c, None)), c2c)
        statistics = sharer_statistics(c2c, found)
        keys = found.theirs.transpose(2, 3).flatten(3).double().mean(2)  # not rotated
        torch.testing.assert_close(statistics.mean, keys)
        torch.testing.assert_close(statistics.mean_cache(torch.tensor([3]))[..., 0, :].flatten(2), keys.float())


def test_rows_of_all_sources_are_measured():
    """They stand source by source."""
    assert spread(3) == [0, 1, 2] and spread(0) == []
    found = spread(1000)
    assert len(set(found)) == STATISTICS_ROWS and found[0] == 0 and found[-1] > 990
    assert sum(i < 500 for i in found) == STATISTICS_ROWS // 2
