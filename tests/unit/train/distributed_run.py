"""A program for test_distributed.py, started by torchrun: trains the recipe in a folder.

    python distributed_run.py FOLDER OUTPUT [DIE_AFTER]

DIE_AFTER: forward passes after which the first process kills itself.

accelerate leaves FSDP out where there is no accelerator, without a word; with ACCELERATE_USE_FSDP it is switched on here, too.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, parse_flag_from_env
from torch.distributed.tensor import DTensor

from cache2cache.train.config import Machine, Recipe
from cache2cache.train.run import train
from cache2cache.train.trainer import FuserTrainer


def shard() -> None:
    """Let accelerate use FSDP on CPUs."""
    initialise, forward = AcceleratorState.__init__, FuserTrainer.training_step

    def sharding(self: AcceleratorState, *args: Any, fsdp_plugin: Any = None, **kwargs: Any) -> None:
        initialise(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    def checked(self: FuserTrainer, model: torch.nn.Module, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters()), "nothing was sharded"
        return forward(self, model, *args, **kwargs)

    AcceleratorState.__init__ = sharding  # type: ignore[method-assign]
    FuserTrainer.training_step = checked  # type: ignore[method-assign]


if __name__ == "__main__":
    torch.set_num_threads(1)
    if parse_flag_from_env("ACCELERATE_USE_FSDP"):
        shard()
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
