"""Training a fuser: the request path with gradients, on prefills from disk, by transformers' Trainer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import EarlyStoppingCallback, Trainer, TrainerCallback, TrainingArguments, set_seed

from cache2cache.fuser.base import Fuser, FuserConfig
from cache2cache.fuser.compact import CompactFuser
from cache2cache.fuser.layer_map import LAYER_MAPS
from cache2cache.fuser.statistics import FeatureStatistics
from cache2cache.inputs import Inputs, SharerInputs
from cache2cache.models import kv
from cache2cache.models.load import LanguageModel, load
from cache2cache.pipeline import C2C
from cache2cache.train.config import Recipe
from cache2cache.train.data import Collator, FeatureDataset, SharerDropout, split
from cache2cache.train.features import PrefillStore
from cache2cache.verify import check_rotation

_STATISTICS_ROWS = 256


class TrainingStep(nn.Module):
    """What Trainer trains: one fuser inside a frozen pair. Only the fuser is a submodule, so only it is saved."""

    def __init__(self, pair: C2C, dropout: SharerDropout | None = None):
        super().__init__()
        (self.fuser,) = pair.fusers
        self._dropout = dropout
        self._pair = [pair]  # in a list, so that the frozen models do not become submodules

    def forward(
        self, own: torch.Tensor, theirs: torch.Tensor, tail_ids: torch.Tensor, labels: torch.Tensor, **batch: Any
    ):
        """Fuse, then let the receiver read the prompt's last token and the response; mean cross-entropy.

        Args:
            own: (2, L_r, B, H_r, N - 1, D_r); theirs: (2, L_s, B, H_s, M, D_s); the rest as in `Collator`.
        """
        (pair,) = self._pair
        prompt = own.shape[4]
        mask, prepared = batch["mask"], as_inputs(batch)
        cache = kv.from_tensors(list(zip(*own.to(pair.receiver.dtype), strict=True)))
        if self._dropout is not None:
            theirs = self._dropout(theirs, batch["sharer_mask"], training=self.training)
        sharer_cache = kv.from_tensors(list(zip(*theirs, strict=True)))
        pair.fuse(cache, mask, prompt, prepared, [sharer_cache])
        mask = torch.cat([mask, mask.new_ones((len(mask), tail_ids.shape[1] - 1))], dim=1)
        logits = pair.receiver.model(
            input_ids=tail_ids,
            attention_mask=mask,
            position_ids=kv.position_ids(mask)[:, prompt:],
            past_key_values=cache,
            use_cache=True,
        ).logits
        loss = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), ignore_index=-100)
        return {"loss": loss, "logits": logits[:, 0].detach().float()}


def as_inputs(batch: dict[str, Any]) -> Inputs:
    """The request path's view of a collated batch."""
    part = SharerInputs(batch["sharer_ids"], batch["sharer_mask"], batch["alignment"], batch["due"])
    return Inputs(batch["ids"], batch["mask"], (part,))


class FuserTrainer(Trainer):
    """Trainer whose checkpoints hold a fuser that loads as any other."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        folder = Path(output_dir or self.args.output_dir)  # type: ignore[arg-type]
        self.accelerator.unwrap_model(self.model).fuser.save_pretrained(folder)

    def create_optimizer(self, *args: Any, **kwargs: Any):
        """AdamW without weight decay on gates, norms and biases, which are not directions to shrink."""
        if self.optimizer is None:
            parameters = list(self.model.named_parameters())  # type: ignore[union-attr]
            decayed = {name for name, _ in parameters if name.endswith(".weight")}
            groups = [
                {"params": [p for n, p in parameters if p.requires_grad and (n in decayed) == keep],
                 "weight_decay": self.args.weight_decay if keep else 0.0}
                for keep in (True, False)
            ]  # fmt: skip
            self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


class Anneal(TrainerCallback):
    """Lowers the gates' temperature after each optimizer step."""

    def __init__(self, fuser: Fuser):
        self.fuser = fuser

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.fuser.gate.anneal(state.global_step)

    on_train_begin = on_step_end  # a resumed run goes on at the temperature of its step


def train(recipe: Recipe, data_dir: Path, output: Path, features: Path, *, resume: bool = False) -> dict[str, Any]:
    """Train a fuser and save it to `output`/fuser. Returns the summary that is saved with it.

    Args:
        data_dir: what the recipe's paths are relative to.
        features: folder for the prefills; may be shared by all runs.
        resume: go on from the last checkpoint in `output`.
    """
    set_seed(recipe.seed)
    device = torch.accelerator.current_accelerator() or torch.device("cpu")
    receiver = load(recipe.receiver, dtype=recipe.dtype, device=device)
    alone = recipe.sharer == recipe.receiver  # its own sharer: one model, one store of prefills
    sharer = receiver if alone else load(recipe.sharer, dtype=recipe.dtype, device=device)
    fuser = Fuser.from_config(new_config(recipe, receiver, sharer))
    pair = C2C(receiver, [sharer], [fuser])
    train_rows, validation_rows, dropped = split(data_dir, recipe.data, recipe.seed)
    own_store = PrefillStore(features, receiver.card, receiver.dtype)
    their_store = own_store if alone else PrefillStore(features, sharer.card, sharer.dtype)
    train_set = FeatureDataset(train_rows, pair, own_store, their_store)
    validation_set = FeatureDataset(validation_rows, pair, own_store, their_store)
    collate = Collator(pair)
    step = TrainingStep(pair, prepared(pair, train_set, collate, recipe.optim.sharer_dropout))
    trainer = FuserTrainer(
        model=step,
        args=arguments(recipe, output),
        data_collator=collate,
        train_dataset=train_set,
        eval_dataset=validation_set,
        compute_metrics=_accuracy,
        callbacks=[Anneal(fuser), EarlyStoppingCallback(recipe.optim.patience)],
    )
    trainer.train(resume_from_checkpoint=resume)
    result = trainer.evaluate()
    summary = {
        "rows": len(train_rows),
        "rows_dropped_as_contaminated": dropped,
        "sources": {source.path: source.limit or "all" for source in recipe.data.train},
        "steps": trainer.state.global_step,
        "best_step": trainer.state.best_global_step,
        "validation_rows": len(validation_rows),
        "validation_loss": round(result["eval_loss"], 4),
        "validation_accuracy": round(result["eval_accuracy"], 4),
        "seed": recipe.seed,
        "optim": recipe.optim.model_dump(mode="json"),
    }
    fuser.config = fuser.config.model_copy(update={"training": summary})
    fuser.eval().save_pretrained(output / "fuser", dtype=torch.bfloat16)
    return summary


def new_config(recipe: Recipe, receiver: LanguageModel, sharer: LanguageModel) -> FuserConfig:
    """The config of the fuser that a recipe describes, for this pair."""
    part = recipe.fuser
    layer_map = LAYER_MAPS[part.layer_map](receiver.card.geometry.layers, sharer.card.geometry.layers)
    return FuserConfig(
        receiver=receiver.card,
        sharer=sharer.card,
        layer_map=layer_map,
        **part.model_dump(exclude={"layer_map"}),
    )


def prepared(pair: C2C, rows: FeatureDataset, collate: Collator, sharer_dropout: float) -> SharerDropout | None:
    """What is measured before the first step: a compact fuser's statistics, and the sharer's for dropping it."""
    (fuser,), (sharer,) = pair.fusers, pair.sharers
    compact = isinstance(fuser, CompactFuser)
    if not compact and not sharer_dropout:
        return None
    batch = collate([rows[i] for i in range(min(_STATISTICS_ROWS, len(rows)))])
    if compact:
        check_rotation(pair.receiver)
        standardise(fuser, batch)
    if sharer.card.geometry.rope_of_layer:
        check_rotation(sharer)
    return SharerDropout(sharer_dropout, sharer_statistics(sharer, batch)) if sharer_dropout else None


def standardise(fuser: CompactFuser, batch: dict[str, torch.Tensor]) -> None:
    """Give a compact fuser the statistics of the positions that it will fuse."""
    rows, columns = batch["due"].nonzero(as_tuple=True)
    at = batch["alignment"][rows, columns]
    other_layers = list(fuser.config.layer_map)
    # (2, L, B, H, N, D) → the chosen positions as one long row (2, L, 1, H, P, D)
    own = batch["own"].permute(0, 1, 3, 2, 4, 5)[:, :, :, rows, columns][:, :, None]
    other = batch["theirs"][:, other_layers].permute(0, 1, 3, 2, 4, 5)[:, :, :, rows, at][:, :, None]
    own_positions = kv.position_ids(batch["mask"])[rows, columns][None]
    fuser.standardise(own, other, own_positions, kv.position_ids(batch["sharer_mask"])[rows, at][None])


def sharer_statistics(sharer: LanguageModel, batch: dict[str, torch.Tensor]) -> FeatureStatistics:
    """Statistics of the sharer's positions that a fuser will hear."""
    at = [alignment[due > 0] for alignment, due in zip(batch["alignment"], batch["due"], strict=True)]
    caches = (batch["theirs"][:, :, b, :, chosen] for b, chosen in enumerate(at))
    positions = kv.position_ids(batch["sharer_mask"])
    return FeatureStatistics.of(sharer.card.geometry, caches, (positions[b, x] for b, x in enumerate(at)))


def arguments(recipe: Recipe, output: Path) -> TrainingArguments:
    """Trainer's arguments for a recipe."""
    optim = recipe.optim
    return TrainingArguments(
        output_dir=str(output),
        seed=recipe.seed,
        learning_rate=optim.learning_rate,
        weight_decay=optim.weight_decay,
        num_train_epochs=optim.epochs,
        per_device_train_batch_size=optim.batch_size,
        per_device_eval_batch_size=optim.batch_size,
        warmup_steps=optim.warmup_steps,
        lr_scheduler_type=optim.schedule,
        max_grad_norm=optim.max_grad_norm,
        eval_strategy="steps",
        eval_steps=optim.eval_steps,
        save_strategy="steps",
        save_steps=optim.eval_steps,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        logging_steps=10,
        remove_unused_columns=False,
        label_names=["labels"],
        report_to="none",
        use_cpu=not torch.accelerator.is_available(),
    )


def _accuracy(prediction: Any) -> dict[str, float]:
    """How often the response's first token is the likeliest of the whole vocabulary."""
    return {"accuracy": float((prediction.predictions.argmax(-1) == prediction.label_ids[:, 0]).mean())}
