"""A training run from beginning to end."""

from __future__ import annotations

from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from torch.utils.data import Dataset
from transformers import TrainerState, TrainingArguments, set_seed

from cache2cache.errors import ModelError, TrainingError
from cache2cache.fuser.compact import CompactFuser
from cache2cache.models import trees
from cache2cache.models.load import LanguageModel
from cache2cache.pipeline import C2C
from cache2cache.train import checkpoints, statistics
from cache2cache.train.arguments import arguments, device_of
from cache2cache.train.batch import Collator, Item
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.contamination import Dropped, write_dropped
from cache2cache.train.dropout import SharerDropout
from cache2cache.train.features import FeatureDataset, check_room
from cache2cache.train.measures import SHOWN
from cache2cache.train.order import Order
from cache2cache.train.prepare import Prepared, load_pair, prepare_rows, say
from cache2cache.train.step import TrainingStep
from cache2cache.train.stream import RowStream, Teach
from cache2cache.train.taught import taught
from cache2cache.train.trainer import FuserTrainer, write_fuser


def train(recipe: Recipe, output: Path, machine: Machine, *, resume: bool = False) -> dict[str, Any]:
    """Train a fuser and save it to `output`/fuser. Returns the summary that is saved with it.

    `output` also gets the recipe (recipe.json), the rows left out (dropped.jsonl), checkpoints, trackers' files and, if the
    run is halted, the batch that did it (halted/). With several processes, all of them call this.

    Args:
        resume: go on with the run in `output`, from its last whole checkpoint if it has one.

    Raises:
        TrainingError: see `checkpoints.held`, `checkpoints.to_resume`, `callbacks.Halt`; also a checkpoint of another number
            of processes, or of other rows.
        DataError, RecipeError: rows or fields that cannot be trained on.
        ModelError, UnknownModelError, DownloadError: a model that cannot take part or be had.
    """
    args = arguments(recipe, output, device_of(machine))
    everyone = PartialState()
    with checkpoints.held(output, recipe, resume=resume) if everyone.is_main_process else nullcontext():
        everyone.wait_for_everyone()
        checkpoint = checkpoints.to_resume(output)
        if checkpoint is not None and checkpoint.processes != args.world_size:
            raise TrainingError(
                "the checkpoint belongs to a run on another number of processes, with other batches",
                got=args.world_size, allowed=checkpoint.processes,
            )  # fmt: skip
        pair = load_pair(recipe, machine)
        prepared = prepare_rows(recipe, pair, machine)
        if checkpoint is not None and checkpoint.rows != prepared.digest:
            raise TrainingError(
                "the rows are no longer those that the run began with",
                hint=f"Restore the data, or give another --output; {output} was trained on other rows",
            )
        trainer = trainer_of(recipe, pair, prepared, machine, args)
        if machine.features is not None and not recipe.data.stream:
            _release_sharer(pair)
        try:
            _run(trainer, checkpoint)
        finally:
            trainer.bar.stop()
        rows = trainer.train_dataset
        dropped = [*prepared.dropped, *(rows.dropped if isinstance(rows, RowStream) else [])]
        summary = _summary(recipe, prepared, dropped, trainer.state)
        _save(trainer, summary, dropped, output)
        return summary


def trainer_of(
    recipe: Recipe, pair: C2C, prepared: Prepared, machine: Machine, args: TrainingArguments
) -> FuserTrainer:
    """Everything that training needs, measured and put together."""
    objective, optim, folder = recipe.objective, recipe.optim, machine.features
    statistics.check_rotations(pair)
    rows: Dataset[Item]
    if folder is not None and not recipe.data.stream:
        check_room(recipe, prepared, pair, folder)
    if recipe.data.stream:
        rows, order = RowStream(recipe, pair, machine, prepared.avoid), None
        measured = [Item(row) for row in prepared.train[: statistics.STATISTICS_ROWS]]
        teach = Teach(pair, objective.distill_top) if objective.distill else None
        validation = FeatureDataset(prepared.validation, pair, None)
    else:
        teachers = taught(prepared.train, pair, folder, objective.distill_top) if objective.distill else None
        rows, teach = FeatureDataset(prepared.train, pair, folder, teachers), None
        measured = [rows[i] for i in statistics.spread(len(rows))]
        group = optim.batch_size * optim.accumulate * args.world_size if optim.bucket else None
        lengths = [len(row.row.ids) + len(row.response) for row in prepared.train]
        order = Order(lengths, seed=recipe.seed, group=group)
        validation = FeatureDataset(prepared.validation, pair, folder)
    step = _step(recipe, pair, measured)
    trainer = FuserTrainer(step, pair, recipe, args, Collator(pair), rows, validation, order, prepared.digest, teach)
    set_seed((recipe.seed + args.process_index) % 2**32)  # gates and dropout draw their own noise on each process
    return trainer


def _step(recipe: Recipe, pair: C2C, measured: list[Item]) -> TrainingStep:
    (fuser,), optim = pair.fusers, recipe.optim
    if recipe.objective.fused == "everywhere" and not trees.readable(
        pair.receiver, max(len(x.row.row.ids) for x in measured)
    ):
        raise ModelError(
            f"{pair.receiver.card.id} cannot read rows that are fused everywhere",
            allowed="models that take a mask of their own for each token",
            hint='Train with objective.fused = "prompt"',
        )
    if measured[0].own is None:
        say(f"reading {len(measured)} rows for the statistics of the caches")
    sample = statistics.sample(measured, pair)
    if isinstance(fuser, CompactFuser) and recipe.fuser.init is None:
        statistics.standardise(fuser, sample)
    mean = statistics.sharer_statistics(pair, sample)
    step = TrainingStep(
        pair,
        recipe.objective,
        precision=optim.precision,
        dropout=SharerDropout(optim.sharer_dropout, mean) if optim.sharer_dropout else None,
        mean=mean,
        checkpointing=optim.gradient_checkpointing,
    )
    if optim.compile:
        step.compile_fuser()
    return step


def _run(trainer: FuserTrainer, checkpoint: checkpoints.Checkpoint | None) -> None:
    """Make the steps that are left, and take the best weights."""
    if checkpoint is None or not checkpoint.ended:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint.folder))
    else:  # Trainer would make one more step
        trainer.state = TrainerState.load_from_json(str(checkpoint.state_file))
        if checkpoint.best_step is not None:
            trainer.load_fuser(checkpoints.folder_of(checkpoint.folder.parent, checkpoint.best_step))
    if trainer.state.best_global_step is None:
        raise TrainingError("no validation gave a likelihood that is finite", hint="Load the models in float32")


def _release_sharer(pair: C2C) -> None:
    """All that it says in this run is on disk."""
    (sharer,) = pair.sharers
    if sharer is not pair.receiver:
        assert isinstance(sharer, LanguageModel), "one that is elsewhere has no features on disk"
        sharer.release()


def _save(trainer: FuserTrainer, summary: dict[str, Any], dropped: list[Dropped], output: Path) -> None:
    fuser, state = trainer.fuser, trainer.fuser_state()
    fuser.config = fuser.config.model_copy(update={"training": summary})
    if trainer.is_world_process_zero():
        write_dropped(output / checkpoints.DROPPED, dropped)
        write_fuser(fuser, state, output / checkpoints.FUSER, dtype=torch.bfloat16)
    trainer.accelerator.wait_for_everyone()


def _summary(recipe: Recipe, prepared: Prepared, dropped: list[Dropped], state: TrainerState) -> dict[str, Any]:
    best = next(x for x in state.log_history if x["step"] == state.best_global_step and "eval_loss" in x)
    measured = {key.removeprefix("eval_"): best[key] for key in SHOWN if key in best}
    return {
        **({"init": recipe.fuser.init} if recipe.fuser.init else {}),
        "rows": "a stream" if recipe.data.stream else len(prepared.train),
        "rows_dropped": dict(Counter(row.reason for row in dropped)),
        "sources": [source.model_dump(mode="json", exclude_defaults=True) for source in recipe.data.train],
        "steps": state.global_step,
        "best_step": state.best_global_step,
        "validation_rows": len(prepared.validation),
        **{f"validation_{name}": round(value, 4) for name, value in measured.items()},
        "seed": recipe.seed,
        "objective": recipe.objective.model_dump(mode="json"),
        "optim": recipe.optim.model_dump(mode="json"),
    }
