"""A program for test_resume.py: trains one recipe without a break, and once more while it is killed again and again.

    python killed_run.py FOLDER SEED

FOLDER holds recipe.json and data/; it gets whole/ and cut/, the two runs. Each attempt is a process of its own, which ends by
SIGKILL: at chosen places, where files are half written or half deleted, and at random moments.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from cache2cache.fuser import store
from cache2cache.train import checkpoints, run
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.trainer import FuserTrainer

_RANDOM_KILLS = 3


def die(*_: Any, **__: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def after(times: int, original: Callable) -> Callable:
    """The same function, until it has been called this often; then death."""
    left = [times]

    def patched(*args: Any, **kwargs: Any) -> Any:
        left[0] -= 1
        return original(*args, **kwargs) if left[0] >= 0 else die()

    return patched


Place = tuple[Any, str, int]
"""Owner of a function, its name, and how often it may be called before the run dies there."""

ON_THE_WAY: dict[str, Place] = {
    "before the first checkpoint": (FuserTrainer, "training_step", 3),
    "with a fuser that is not in its place yet": (store, "save_file", 0),
    "with a fuser but no optimizer": (FuserTrainer, "_save_optimizer_and_scheduler", 0),
    "before a checkpoint is declared whole": (checkpoints, "complete", 1),
    "between two checkpoints": (FuserTrainer, "training_step", 7),
    "in the middle of deleting one": (checkpoints.shutil, "rmtree", 0),
}
AT_THE_END: dict[str, Place] = {
    "with everything trained and nothing saved": (run, "write_dropped", 0),
    "with everything saved but the final fuser": (run, "write_fuser", 0),
}


def main(folder: Path, seed: int) -> None:
    recipe = Recipe.model_validate_json((folder / "recipe.json").read_text())
    machine = Machine(data_dir=folder / "data", features=folder / "features", device="cpu")

    def attempt(output: Path, prepare: Callable[[], None], kill_after: float | None = None) -> bool:
        """Whether it came to the end."""
        child = os.fork()
        if child == 0:
            torch.set_num_threads(1)
            prepare()
            run.train(recipe, output, machine, resume=True)
            os._exit(0)
        if kill_after is not None:
            time.sleep(kill_after)
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        assert status in (0, signal.SIGKILL), f"an attempt ended with {status}"
        return status == 0

    begun = time.monotonic()
    assert attempt(folder / "whole", lambda: None)
    whole = time.monotonic() - begun
    draw = random.Random(seed)

    def at(place: Place) -> tuple[Callable[[], None], None]:
        owner, name, times = place
        return lambda: setattr(owner, name, after(times, getattr(owner, name))), None

    kills: list[tuple[Callable[[], None], float | None]] = [at(place) for place in ON_THE_WAY.values()]
    kills += [(lambda: None, draw.uniform(0.1, 0.7) * whole) for _ in range(_RANDOM_KILLS)]
    kills += [at(place) for place in AT_THE_END.values()]
    killed = sum(not attempt(folder / "cut", *kill) for kill in kills)
    assert attempt(folder / "cut", lambda: None)
    print(f"killed {killed} times")  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
