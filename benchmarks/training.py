"""Rows trained on per second, with and without the feature cache, against the floor.

    python benchmarks/training.py recipes/demo/recipe.toml --data-dir DATA --out training.json

The floor is the time that the multiplications alone would take at the rate of one large matrix product on this processor, in
the models' dtype: of both prefills (without the cache only), of the fuser, and of the receiver's tail, forward and backward.
It counts real tokens, no padding, and leaves out everything that is not a product. Steps are the trainer's own, timed after a
warm-up; prefills that the cache lacks are computed first, into a folder that is deleted unless --features names one.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import TrainerCallback

from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel
from cache2cache.models.rate import products_per_second
from cache2cache.models.skeleton import head_weight, layer_weights
from cache2cache.pipeline import C2C
from cache2cache.train import run
from cache2cache.train.arguments import arguments, device_of
from cache2cache.train.batch import TrainRow
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.prepare import Prepared, load_pair, prepare_rows
from cache2cache.train.recipes import read_recipe

WARM_UP = 2
"""Steps that are not counted."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as for c2c train")
    parser.add_argument("--data-dir", type=Path, default=Path())
    parser.add_argument("--features", type=Path, help="folder of prefills that may be there already")
    parser.add_argument("--steps", type=int, default=20, help="that are counted")
    parser.add_argument("--live-steps", type=int, default=5, help="the same without the cache; 0 leaves it out")
    parser.add_argument("--device")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    with tempfile.TemporaryDirectory() as folder:
        machine = Machine(args.data_dir, args.features or Path(folder) / "features", args.device)
        recipe = read_recipe(args.recipe, args.set)
        if recipe.data.stream:
            parser.error("a stream keeps no prefills to measure with: --set data.stream=false")
        pair = load_pair(recipe, machine)
        prepared = _enough(prepare_rows(recipe, pair, machine), recipe, args.steps)
        # All rows are also read for statistics, without the cache by the models.
        few = _enough(prepared, recipe, args.live_steps)
        measured = {"with the cache": rows_per_second(recipe, pair, prepared, machine, args.steps)}
        if args.live_steps:
            measured["without"] = rows_per_second(recipe, pair, few, _live(machine), args.live_steps)
        device = device_of(machine)
        rate = products_per_second(pair.receiver.dtype, device, 2048 if device.type == "cpu" else 8192)
    work = operations(pair, prepared.train)
    tail = work["fuser"] + work["tail"]
    floors = {"with the cache": rate / tail, "without": rate / (tail + work["prefills"])}
    result = {
        "machine": {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()},
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "recipe": str(args.recipe),
        "operations_per_second": rate,
        "operations_per_row": work,
        "rows_per_second": measured,
        "floor": floors,
        "share_of_floor": {name: measured[name] / floors[name] for name in measured},
    }
    if args.out:
        args.out.write_text(json.dumps(result, indent=1))
    report(result)


def _enough(prepared: Prepared, recipe: Recipe, steps: int) -> Prepared:
    """As many rows as will be seen, and one batch to validate on."""
    optim = recipe.optim
    count = (steps + WARM_UP) * optim.batch_size * optim.accumulate
    return Prepared(prepared.train[:count], prepared.validation[: optim.batch_size], prepared.dropped, prepared.avoid)


def _live(machine: Machine) -> Machine:
    return Machine(machine.data_dir, None, machine.device)


def rows_per_second(recipe: Recipe, pair: C2C, prepared: Prepared, machine: Machine, steps: int) -> float:
    """Of the trainer's loop, at the median step."""
    total = steps + WARM_UP
    optim = recipe.optim.model_copy(update={"max_steps": total})
    watch = recipe.watch.model_copy(update={"eval_steps": 10 * total, "log_steps": 10 * total, "report_to": ()})
    recipe = recipe.model_copy(update={"optim": optim, "watch": watch})
    (fuser,) = pair.fusers
    pair = C2C(pair.receiver, pair.sharers, [Fuser.from_config(fuser.config)])  # a fresh one
    stopwatch = _Stopwatch()
    with tempfile.TemporaryDirectory() as output:
        args = arguments(recipe, Path(output), device_of(machine))
        trainer = run.trainer_of(recipe, pair, prepared, machine, args)
        trainer.add_callback(stopwatch)
        trainer.train()
    taken = [after - before for before, after in zip(stopwatch.ends, stopwatch.ends[1:], strict=False)][WARM_UP - 1 :]
    return optim.batch_size * optim.accumulate / statistics.median(taken)


class _Stopwatch(TrainerCallback):
    """When each step ended."""

    def __init__(self) -> None:
        self.ends: list[float] = []

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if args.device.type != "cpu":
            torch.accelerator.synchronize()
        self.ends.append(time.perf_counter())


def operations(pair: C2C, rows: Sequence[TrainRow]) -> dict[str, float]:
    """Operations of the mean row, by stage.

    Forward, every weight takes 2 for each token; backward, 2 for the gradient of what goes in and, of the fuser, 2 for its
    own, but none for the gradient of the caches, which the fuser's first map reads.
    """
    (fuser,), (sharer,) = pair.fusers, pair.sharers
    prefills = fusing = tail = 0.0
    entries = len(fuser.gate.open()) / fuser.gate.logit.numel() if not fuser.config.gate.learned else 1.0
    weights = sum(p.numel() for name, p in fuser.named_parameters() if name.endswith(".weight"))
    first = fuser.get_parameter("enter.weight").numel()
    for row in rows:
        prompt, response = len(row.row.ids), len(row.response)
        own, theirs = row.first_stop, len(row.row.sharers[0].ids)  # type: ignore[union-attr]
        prefills += forward(pair.receiver, own, 0) + forward(sharer, theirs, 0)
        fusing += entries * len(row.heard) * (6 * weights - 2 * first)
        head = head_weight(pair.receiver).numel()
        read = prompt - own - 1 + response  # what is read over a fused cache, the prompt's last token included
        tail += 2 * forward(pair.receiver, read, own) + 4 * head * response
    return {"prefills": prefills / len(rows), "fuser": fusing / len(rows), "tail": tail / len(rows)}


def forward(lm: LanguageModel, tokens: int, past: int) -> float:
    """Operations of reading tokens behind a cache of `past` positions, without the output head."""
    config = lm.model.config.get_text_config(decoder=True)
    size = lm.card.geometry
    weights = sum(weight.numel() for weight in layer_weights(lm))
    seen = tokens * past + tokens * (tokens + 1) / 2  # pairs of a query and a key
    return 2 * weights * tokens + 4 * size.layers * config.num_attention_heads * size.head_dim * seen


def report(result: dict) -> None:
    """Print the result as Markdown."""
    work, rate = result["operations_per_row"], result["operations_per_second"]
    said = ", ".join(f"{name} {amount / 1e9:.1f}" for name, amount in work.items())
    print(f"{rate / 1e9:,.0f} G operations per second; G operations per row: {said}\n")
    print("| features | rows per second | floor | share |")
    print("|---|---:|---:|---:|")
    for name, measured in result["rows_per_second"].items():
        print(f"| {name} | {measured:.2f} | {result['floor'][name]:.2f} | {result['share_of_floor'][name]:.0%} |")


if __name__ == "__main__":
    main()
