"""What accompanies a run: the gates' temperature, a brake, a progress bar."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import reduce
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from safetensors.torch import save_file
from torch import nn
from transformers import TrainerCallback

from cache2cache.errors import TrainingError
from cache2cache.fuser.base import Fuser
from cache2cache.pipeline import C2C
from cache2cache.train.checkpoints import HALTED
from cache2cache.train.config import ObjectivePart
from cache2cache.train.measures import SHOWN


@dataclass
class Running:
    """The optimizer step under way, for callbacks, which Trainer hands neither batches nor losses."""

    batches: list[dict[str, Any]] = field(default_factory=list)
    """Of this process, one per forward pass."""
    loss: torch.Tensor | float = 0.0
    """Their sum so far, nats per response token; of all processes once the step is about to be made."""
    tokens: int = 0
    """Response tokens of all steps so far, over all processes."""


class Anneal(TrainerCallback):
    """Lowers the gates' temperature after each optimizer step."""

    def __init__(self, fuser: Fuser):
        self.fuser = fuser

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.fuser.gate.anneal(state.global_step)

    on_train_begin = on_step_end  # a resumed run goes on at the temperature of its step


class Halt(TrainerCallback):
    """Ends a run before it steps on a loss or a gradient that is not finite, or on a loss that explodes.

    A uniform guess costs ln(vocabulary) nats per token; twice that, for each term of the objective, is an explosion. The
    step's batches are saved, with their rows as text and where those lie.
    """

    def __init__(self, pair: C2C, objective: ObjectivePart, running: Running, output: Path):
        self.pair, self.running, self.folder = pair, running, output / HALTED
        guess = math.log(pair.receiver.model.get_output_embeddings().weight.shape[0])  # type: ignore[union-attr]
        terms = max(objective.response, objective.receiver) + objective.distill + objective.contrastive
        self.limit = 2 * guess * terms + objective.contrastive * objective.margin

    def on_pre_optimizer_step(self, args, state, control, *, model: nn.Module, **kwargs) -> None:
        """Raises:
        TrainingError: the loss or a gradient is not finite, or the loss is above the limit.
        """
        if args.world_size > 1:  # each process has its share, times their number; all see the same and end together
            self.running.loss = reduce(torch.as_tensor(self.running.loss), "mean")  # type: ignore[assignment]
        loss = float(self.running.loss)
        said: dict[str, str] = {}
        if not math.isfinite(loss) or loss > self.limit:
            what = "the loss is not finite" if not math.isfinite(loss) else "the loss explodes"
            said = {"got": f"{loss:.4g}", "allowed": f"at most {self.limit:.4g}"}
        elif not _finite(model):
            what = "gradients are not finite"
        else:
            return
        self._save(args.process_index)
        raise TrainingError(
            f"{what} in step {state.global_step + 1}",
            **said,
            hint=f"Its rows are in {self.folder}; try a lower learning rate, a longer warm-up, or models in float32",
        )

    def _save(self, process: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        tensors, rows = {}, []
        for i, batch in enumerate(self.running.batches):
            tensors |= {
                f"{i}.{name}": x.detach().to("cpu").contiguous()
                for name, x in batch.items()
                if isinstance(x, torch.Tensor)
            }
            decode = self.pair.receiver.tokenizer.decode
            for place, *row in zip(*(batch[name] for name in ("places", "ids", "mask", "labels")), strict=True):
                ids, mask, labels = row
                text = {"prompt": decode(ids[mask.bool()]), "response": decode(labels[labels >= 0])}
                rows.append({"place": place, **text})
        save_file(tensors, self.folder / f"batches-{process}.safetensors")
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (self.folder / f"rows-{process}.jsonl").write_text(text, encoding="utf-8")


def _finite(model: nn.Module) -> bool:
    """Whether all gradients are. Which are not cannot be told any more: clipping has spread it to all."""
    return bool(nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None]).isfinite())


class Bar(TrainerCallback):
    """Progress of a run: a bar on a terminal, and everywhere a line for each validation."""

    def __init__(self, running: Running, console: Console | None = None):
        self.running, self._console = running, console or Console(stderr=True)
        self._bar = Progress(
            TextColumn("train"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[said]}", markup=False),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task: TaskID | None = None
        self._loss: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._begun, self._first = time.monotonic(), state.global_step
        self._task = self._bar.add_task("", total=state.max_steps, completed=state.global_step, said="")
        if state.is_world_process_zero:
            self._bar.start()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        assert self._task is not None, "steps come after the beginning"
        self._bar.update(self._task, completed=state.global_step, said=self._said(state))

    def on_log(self, args, state, control, *, logs: dict[str, float], **kwargs) -> None:
        self._loss = logs.get("loss", self._loss)

    def on_evaluate(self, args, state, control, *, metrics: dict[str, float], **kwargs) -> None:
        if state.is_world_process_zero and self._task is not None:
            found = ", ".join(f"{name} {metrics[key]:.4f}" for key, name in SHOWN.items() if key in metrics)
            line = f"step {state.global_step}/{state.max_steps}: {self._said(state)} · validation {found}"
            self._bar.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.stop()

    def stop(self) -> None:
        """Give the terminal back, also after an error."""
        self._bar.stop()

    def _said(self, state) -> str:
        seconds, steps = time.monotonic() - self._begun, state.global_step - self._first
        left = timedelta(seconds=round(seconds / max(steps, 1) * (state.max_steps - state.global_step)))
        loss = self._loss if self._loss is not None else float(self.running.loss)
        return f"loss {loss:.4f}, {self.running.tokens / max(seconds, 1e-9):.3g} response tokens/s, {left} left"
