"""Where a run computes, and Trainer's arguments for it."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import FullyShardedDataParallelPlugin
from accelerate.utils import parse_flag_from_env
from torch.distributed.fsdp import StateDictType
from transformers import TrainingArguments
from transformers.integrations.integration_utils import get_reporting_integration_callbacks

from cache2cache.errors import RecipeError, TrainingError
from cache2cache.train.config import Machine, Recipe


def device_of(machine: Machine) -> torch.device:
    """Where this process computes.

    Raises:
        RecipeError: one accelerator for several processes.
    """
    found = torch.accelerator.current_accelerator() or "cpu"
    device = torch.device(machine.device or found)
    several = int(os.environ.get("WORLD_SIZE", 1)) > 1
    if device.type == "cpu":
        return device
    if device.index is not None and several:
        raise RecipeError(
            "several processes cannot share one accelerator",
            got=device,
            allowed=device.type,
            hint="Leave the number out",
        )
    return device if device.index is not None else torch.device(device.type, int(os.environ.get("LOCAL_RANK", 0)))


def arguments(recipe: Recipe, output: Path, device: torch.device) -> TrainingArguments:
    """Trainer's arguments for a recipe, on one device per process.

    Several processes take equal shares: where the rows of an epoch do not fill its last batches, accelerate fills them up
    with the epoch's first rows.

    Raises:
        TrainingError: FSDP that is to save shards, which are no fuser; a precision from accelerate instead of the recipe.
        RecipeError: a tracker that transformers does not know, or that is not installed.
    """
    _check_fsdp()
    _check_precision()
    _check_trackers(recipe.watch.report_to)
    optim, watch = recipe.optim, recipe.watch
    args = TrainingArguments(
        output_dir=str(output),
        seed=recipe.seed,
        learning_rate=optim.learning_rate,
        num_train_epochs=optim.epochs,
        max_steps=optim.max_steps or -1,
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=optim.batch_size,
        gradient_accumulation_steps=optim.accumulate,
        warmup_steps=optim.warmup_steps,
        lr_scheduler_type=optim.schedule,
        max_grad_norm=optim.max_grad_norm,
        eval_strategy="steps",
        eval_steps=watch.eval_steps,
        save_strategy="steps",
        save_steps=watch.eval_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        restore_callback_states_from_checkpoint=True,  # how long early stopping has waited
        logging_steps=watch.log_steps,
        logging_nan_inf_filter=False,  # `Halt` wants to see them
        disable_tqdm=True,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to=list(watch.report_to) or "none",
        use_cpu=device.type == "cpu",
        dataloader_pin_memory=device.type != "cpu",
        ddp_find_unused_parameters=False,
        # Otherwise one process would read a stream and cut its batches for the others, along the wrong dimensions.
        accelerator_config={"dispatch_batches": False},
    )
    if args.world_size == 1 and device.type != "cpu":
        # Trainer alone would take the first accelerator, and copy the model to all others (DataParallel).
        args._n_gpu = 1
        args.__dict__["_setup_devices"] = device
        torch.accelerator.set_device_index(device.index or 0)
    return args


def _check_fsdp() -> None:
    if not parse_flag_from_env("ACCELERATE_USE_FSDP"):
        return
    saved = FullyShardedDataParallelPlugin().state_dict_type
    if saved != StateDictType.FULL_STATE_DICT:
        raise TrainingError(
            "FSDP must save whole fusers, not shards of them",
            got=saved.name if isinstance(saved, StateDictType) else saved,
            allowed=StateDictType.FULL_STATE_DICT.name,
            hint="accelerate launch --fsdp_state_dict_type FULL_STATE_DICT …",
        )


def _check_precision() -> None:
    chosen = os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if chosen != "no":
        raise TrainingError(
            "a recipe says how precisely a run computes, accelerate must not",
            got=f"mixed precision {chosen}", allowed="no",
            hint="accelerate launch --mixed_precision no …; the recipe's fields are dtype and optim.precision",
        )  # fmt: skip


def _check_trackers(names: Sequence[str]) -> None:
    try:
        get_reporting_integration_callbacks(list(names))
    except (ValueError, RuntimeError) as error:
        raise RecipeError("watch.report_to names a tracker that cannot be used", got=error) from error
