"""`c2c features`: the prefills of a recipe's rows, ahead of training."""

from __future__ import annotations

from cache2cache.cli import pair as options
from cache2cache.cli import recipe as recipes


def features(
    recipe: recipes.File,
    overrides: recipes.Set = None,
    data_dir: recipes.DataDir = None,
    features: recipes.Features = None,
    device: recipes.Device = None,
    sharer_device: options.SharerDevice = None,
    trust_remote_code: options.TrustRemoteCode = False,
) -> None:
    """Compute what `c2c train` would of both frozen models, and keep it on disk.

    Interrupted, it goes on where it stopped; training finds what is there. Under torchrun the processes share the work.
    """
    from cache2cache.models.pull import home
    from cache2cache.train.config import Machine

    machine = Machine(data_dir, features or home() / "features", device, sharer_device, trust_remote_code)
    read = recipes.read("c2c features", recipe, overrides, machine)
    from cache2cache.train.features import precompute

    precompute(read, machine)
