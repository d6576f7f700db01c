import pytest

from cache2cache.fuser.layer_map import LAYER_MAPS, depth_normalised, last_aligned


def test_last_aligned():
    assert last_aligned(4, 6) == (2, 3, 4, 5)
    assert last_aligned(5, 3) == (0, 0, 0, 1, 2)


def test_depth_normalised():
    assert depth_normalised(4, 6) == (0, 2, 3, 5)
    assert depth_normalised(3, 2) == (0, 0, 1), "a tie goes to the lower layer"


@pytest.mark.parametrize("name", LAYER_MAPS)
@pytest.mark.parametrize(("receiver", "sharer"), [(1, 5), (5, 1), (1, 1), (30, 28), (16, 28)])
def test_every_map_ends_at_the_last_layer(name, receiver, sharer):
    layer_map = LAYER_MAPS[name](receiver, sharer)
    assert len(layer_map) == receiver
    assert all(0 <= layer < sharer for layer in layer_map)
    assert list(layer_map) == sorted(layer_map)
    if receiver > 1 or name == "last-aligned":
        assert layer_map[-1] == sharer - 1
