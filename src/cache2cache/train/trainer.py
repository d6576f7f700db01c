"""transformers' Trainer for a fuser: what it optimises, in which order it reads, what it measures, what a checkpoint holds."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import Dataset, IterableDataset
from transformers import EarlyStoppingCallback, PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from cache2cache.fuser.base import Fuser
from cache2cache.fuser.store import WEIGHTS, assemble, save_fuser
from cache2cache.pipeline import C2C
from cache2cache.train import checkpoints
from cache2cache.train.batch import Collator
from cache2cache.train.callbacks import Anneal, Bar, Halt, Running
from cache2cache.train.config import Recipe
from cache2cache.train.measures import MEASURES, measures, watched
from cache2cache.train.order import Order
from cache2cache.train.step import TrainingStep


class FuserTrainer(Trainer):
    """Trains a `TrainingStep`.

    Args:
        order: how the training rows are drawn; None for a stream, which has its own order.
        digest: of the rows, for checkpoints.
        teach: adds teachers to the batches of a step; none by default.
    """

    def __init__(
        self,
        step: TrainingStep,
        pair: C2C,
        recipe: Recipe,
        args: TrainingArguments,
        collate: Collator,
        train_rows: Dataset | IterableDataset,
        validation_rows: Dataset,
        order: Order | None,
        digest: str,
        teach: Callable[[dict[str, Any]], dict[str, Any]] | None = None,
    ):
        self.running, self.fuser = Running(), step.fuser
        self._recipe, self._order, self._digest, self._teach = recipe, order, digest, teach
        output = Path(args.output_dir or "")
        self.bar = Bar(self.running)
        callbacks: list[TrainerCallback] = [
            Anneal(step.fuser),
            Halt(pair, recipe.objective, self.running, output),
            EarlyStoppingCallback(recipe.watch.patience),
            self.bar,
        ]
        if order is not None:
            callbacks.append(_Epoch(order))
        super().__init__(
            model=step,
            args=args,
            data_collator=collate,
            train_dataset=train_rows,  # type: ignore[arg-type]
            eval_dataset=validation_rows,
            compute_metrics=measures,
            callbacks=callbacks,
        )
        self.remove_callback(PrinterCallback)
        self.model_accepts_loss_kwargs = True  # the step divides by num_items_in_batch

    # --- what is optimised --------------------------------------------------------------------------------------

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """AdamW without weight decay on gates, norms and biases, which are not directions to shrink."""
        if self.optimizer is None:
            optim = self._recipe.optim
            groups: dict[str, dict[str, Any]] = {
                "weights": {"params": [], "weight_decay": optim.weight_decay},
                "norms and biases": {"params": [], "weight_decay": 0.0},
                "gates": {"params": [], "weight_decay": 0.0, "lr": optim.gate_learning_rate or optim.learning_rate},
            }
            for name, parameter in (model or self.model).named_parameters():  # type: ignore[union-attr]
                if parameter.requires_grad:
                    gate = name.endswith("gate.logit")
                    kind = "gates" if gate else "weights" if name.endswith(".weight") else "norms and biases"
                    groups[kind]["params"].append(parameter)
            used = [group for group in groups.values() if group["params"]]
            self.optimizer = torch.optim.AdamW(used, lr=optim.learning_rate)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Order | None:
        return self._order

    def get_batch_samples(
        self, epoch_iterator: Iterator, num_batches: int, device: torch.device
    ) -> tuple[list, torch.Tensor | int | None]:
        """The batches of one optimizer step, and their response tokens over all processes."""
        batches, tokens = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._teach is not None:  # not when they are put together: a resumed run skips the first ones
            batches = [self._teach(batch) for batch in batches]
        self.running.batches, self.running.loss = batches, 0.0
        self.running.tokens += int(tokens or 0)
        return batches, tokens

    def training_step(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """One forward and backward pass. Returns its part of the step's loss."""
        loss = super().training_step(*args, **kwargs)
        self.running.loss = self.running.loss + loss
        return loss

    # --- what is measured ---------------------------------------------------------------------------------------

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss, `MEASURES` (B, 5), and tokens (B,) in the place of labels, without which Trainer measures nothing."""
        with torch.no_grad():
            out = model(**self._prepare_inputs(inputs))
        return out["loss"], torch.stack([out[name].float() for name in MEASURES], dim=1), out["tokens"]

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """With each validation, what the fuser's weights say."""
        if "eval_loss" in logs and (state := self.fuser_state()):
            logs = logs | watched(state, self.fuser)
        super().log(logs, start_time)

    # --- what is kept -------------------------------------------------------------------------------------------

    def fuser_state(self) -> dict[str, torch.Tensor]:
        """The fuser's tensors by name, gathered if they are sharded, then only on the main process. All processes call it."""
        return _of_fuser(self.accelerator.get_state_dict(self.model))  # type: ignore[arg-type]

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """A fuser that loads as any other; no second copy of its weights, no pickled arguments.

        Args:
            state_dict: the whole model's, where it was gathered from shards.
        """
        state = _of_fuser(state_dict) if state_dict is not None else self.fuser_state()
        write_fuser(self.fuser, state, Path(output_dir or self.args.output_dir))  # type: ignore[arg-type]

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            output = Path(self.args.output_dir)  # type: ignore[arg-type]
            folder = checkpoints.folder_of(output, self.state.global_step)
            checkpoints.complete(folder, self.args.world_size, self._digest)
            checkpoints.prune(output, self._recipe.watch.keep)
        self.accelerator.wait_for_everyone()

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            self.load_fuser(Path(resume_from_checkpoint))

    def _load_best_model(self) -> None:
        if self.is_fsdp_enabled:
            super()._load_best_model()
        else:
            self.load_fuser(Path(self.state.best_model_checkpoint))  # type: ignore[arg-type]

    def load_fuser(self, folder: Path) -> None:
        """Take a checkpoint's weights, all of them; Trainer's own way only warns of those that are missing.

        Raises:
            TrainingError: the checkpoint is damaged.
        """
        checkpoints.Checkpoint(folder).check()
        self.fuser.load_state_dict(load_file(folder / WEIGHTS))


class _Epoch(TrainerCallback):
    """Tells the order its epoch: accelerate does not reach it behind the batches that a resumed run skips on several
    processes."""

    def __init__(self, order: Order):
        self._order = order

    def on_epoch_begin(self, args, state, control, **kwargs) -> None:
        self._order.set_epoch(int(state.epoch or 0))


def write_fuser(
    fuser: Fuser, state: Mapping[str, torch.Tensor], folder: Path, *, dtype: torch.dtype | None = None
) -> None:
    """Save a fuser with these weights in the place of its own, which may be shards.

    Args:
        dtype: of the weights on disk; as they are by default.
    """
    whole = {name: x.detach().to("cpu") for name, x in state.items()}
    save_fuser(assemble(fuser.config, whole, None, folder), folder, dtype=dtype)


def _of_fuser(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Of a whole model's tensors, the fuser's."""
    return {name.removeprefix("fuser."): x for name, x in state.items() if name.startswith("fuser.")}
