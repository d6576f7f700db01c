"""A program for test_distributed.py, started by torchrun: trains the recipe in a folder.

    python distributed_run.py FOLDER OUTPUT [DIE_AFTER]

DIE_AFTER: forward passes after which the first process kills itself.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from cache2cache.train.config import Machine, Recipe
from cache2cache.train.run import train
from cache2cache.train.trainer import FuserTrainer

if __name__ == "__main__":
    torch.set_num_threads(1)
    folder, output = Path(sys.argv[1]), sys.argv[2]
    if len(sys.argv) > 3 and os.environ["RANK"] == "0":
        training_step, left = FuserTrainer.training_step, [int(sys.argv[3])]

        def dying(self: FuserTrainer, *args: Any, **kwargs: Any) -> torch.Tensor:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return training_step(self, *args, **kwargs)

        FuserTrainer.training_step = dying  # type: ignore[method-assign]
    recipe = Recipe.model_validate_json((folder / f"{output}.json").read_text())
    machine = Machine(data_dir=folder / "data", features=folder / f"features-{output}", device="cpu")
    train(recipe, folder / output, machine, resume=True)
