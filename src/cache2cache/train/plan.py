"""What a run would take, found out without starting it: no weights are loaded, nothing is kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import psutil
import torch

from cache2cache.fuser.base import Fuser
from cache2cache.models.skeleton import Skeleton, skeleton
from cache2cache.pipeline import C2C
from cache2cache.train.arguments import device_of
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.costs import batch_bytes, batch_seconds, on_line
from cache2cache.train.prepare import Prepared, fuser_to_begin_with, new_config, prepare_rows
from cache2cache.train.statistics import STATISTICS_ROWS, measured_rows
from cache2cache.train.workload import Reading, Schedule, columns, fetching, heard_by, live, stored, teaching

_HELD = torch.long.itemsize + torch.float32.itemsize
"""Bytes in memory of one token of a teacher's distribution."""


@dataclass(frozen=True)
class Plan:
    """What a run would take on this machine, in one process."""

    counts: Mapping[str, int]
    """Rows, tokens, parameters and steps."""
    memory: Mapping[str, float]
    """Bytes at the fullest moment, by what holds them, on all devices together."""
    time: Mapping[str, float]
    """Seconds by stage."""
    disk: Mapping[str, float]
    """Bytes that will be added, by what they hold."""
    notes: tuple[str, ...]
    """What the numbers leave out."""

    def rows(self) -> list[tuple[str, str, str]]:
        """The plan as a table: topic, what, how much."""
        table = [("", name, f"{count:,}") for name, count in self.counts.items()]
        for topic, parts, said in (("memory", self.memory, _gb), ("time", self.time, _clock), ("disk", self.disk, _gb)):
            table.append((topic, "in all", said(sum(parts.values()))))
            table += [("", name, said(amount)) for name, amount in parts.items() if amount]
        return table + [("note", note, "") for note in self.notes]


def _gb(size: float) -> str:
    return f"{size / 1e9:,.2f} GB"


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def plan(recipe: Recipe, machine: Machine) -> Plan:
    """Read configs, tokenizers and rows, take a few steps with a shallow copy of the pair, and reckon up.

    Models that would have to be fetched from a package registry are not: the catalogue knows their sizes, and their tokens
    are estimated.

    Raises:
        UnknownModelError, ModelError: see `models.skeleton.skeleton`.
        DataError, RecipeError: see `prepare.prepare_rows`.
        FuserFormatError, FuserMismatchError, RecipeError: see `prepare.fuser_to_begin_with`.
    """
    options = {"dtype": recipe.dtype, "trust_remote_code": machine.trust_remote_code}
    receiver, sharer = skeleton(recipe.receiver, **options), skeleton(recipe.sharer, **options)
    config = new_config(recipe, receiver.lm.card, sharer.lm.card)
    with torch.device("meta"):
        fuser = Fuser.from_config(config)
    if recipe.fuser.init is not None:
        fuser_to_begin_with(fuser, recipe.fuser.init)
    pair = C2C(receiver.lm, [sharer.lm], [fuser])
    return _Reckoning(recipe, machine, pair, (receiver, sharer), prepare_rows(recipe, pair, machine)).plan()


class _Reckoning:
    """Everything that was measured for a plan, put together."""

    def __init__(
        self, recipe: Recipe, machine: Machine, pair: C2C, models: tuple[Skeleton, Skeleton], prepared: Prepared
    ):
        self.recipe, self.machine, self.models, self.validation = recipe, machine, models, prepared.validation
        self.dropped, self.rows = prepared.dropped, prepared.train
        device = device_of(machine)
        self.devices = device, torch.device(machine.sharer_device or device)
        # Before anything is measured: what a run, too, has when its models are loaded.
        self.process = psutil.Process().memory_info().rss if device.type == "cpu" else 0
        self.schedule = Schedule.of(recipe, self.rows, self.validation)
        self.typical = batch_seconds(pair, recipe, self.schedule.typical, device)
        self.largest = batch_bytes(pair, recipe, self.schedule.largest, device)
        self.judged = self.largest.judge
        if columns(self.schedule.judged) > columns(self.schedule.largest):
            self.judged = batch_bytes(pair, recipe, self.schedule.judged, device).judge
        self.live = self.stored = self.taught = Reading()
        self.fetch = self.held = 0.0
        folder = None if recipe.data.stream else machine.features
        if folder is None:
            self.live = live(pair, self.schedule.typical, self.devices)
        else:
            self.stored = stored(pair, [*self.rows, *self.validation], folder, self.devices)
            self.fetch = fetching(pair, self.rows, folder) * len(self.schedule.typical)
        if recipe.objective.distill:
            top = recipe.objective.distill_top
            self.taught = teaching(pair, self.rows, top, self.devices[1], folder)
            if folder is None and not recipe.data.stream:
                self.held = top * _HELD * sum(len(row.response) for row in self.rows)
        (self.fuser,) = pair.fusers
        self.trained = sum(p.numel() for p in self.fuser.parameters() if p.requires_grad)
        self.tensors = sum(x.numel() for x in self.fuser.state_dict().values())
        self.moments = 2 * 4 * self.trained  # Adam's, in float32

    def plan(self) -> Plan:
        counts = {
            "training rows" if not self.recipe.data.stream else "first rows of the stream": len(self.rows),
            "validation rows": len(self.validation),
            "dropped rows": len(self.dropped),
            "prompt tokens of the receiver": sum(len(row.row.ids) for row in self.rows),
            "prompt tokens of the sharer": sum(len(heard_by(row)) for row in self.rows),
            "response tokens": sum(len(row.response) for row in self.rows),
            "trained parameters": self.trained,
            "optimizer steps": self.schedule.steps,
        }
        return Plan(counts, self._memory(), self._time(), self._disk(), tuple(self._notes()))

    def _time(self) -> dict[str, float]:
        todo, typical = self.schedule, self.typical
        measured = measured_rows(self.rows)
        batch = len(todo.typical)
        taught = self.taught.seconds
        if self.recipe.data.stream:  # every row is taught when it comes
            taught *= todo.passes * len(todo.typical) / len(self.rows)
        slower = max(0.0, self.fetch - typical.collate)  # than from the file that collating was measured with
        passing = self.live.seconds + slower + typical.collate + typical.learn
        return {
            "prefills": self.stored.seconds,
            "distributions of the sharer": taught,
            "statistics": self.live.seconds * min(STATISTICS_ROWS, len(self.rows)) / batch
            + on_line(typical.measure, typical.measure_twice, (batch, 2 * batch), measured),
            "steps": todo.passes * passing + todo.steps * typical.update,
            "validations": todo.validation_passes * (self.live.seconds + slower + typical.judge),
        }

    def _memory(self) -> dict[str, float]:
        receiver, sharer = self.models
        largest, batch = self.largest, len(self.schedule.largest)
        alone = self.recipe.receiver == self.recipe.sharer and self.devices[0] == self.devices[1]
        measured = measured_rows(self.rows)
        # Trainer fetches the batches of a step together, and accelerate one more.
        learning = largest.learn + self.recipe.optim.accumulate * largest.collate + self.live.memory
        training = max(learning, self.moments + self.judged + self.live.memory)
        statistics = on_line(largest.measure, largest.measure_twice, (batch, 2 * batch), measured)
        reading = max(statistics, self.stored.memory, self.taught.memory)
        theirs = 0.0 if alone else sharer.weights
        if self.live.seconds or self.devices[0] != self.devices[1]:
            activations = max(training, reading)
        else:  # the sharer's weights are given back before the first step: the parts are those of the fullest moment
            theirs, activations = max((theirs, reading), (0.0, training), key=sum)
        return {
            f"receiver on {self.devices[0]}": receiver.weights,
            f"sharer on {self.devices[1]}": theirs,
            "fuser": 4 * self.tensors,
            "activations, gradients, optimizer": activations,
            "distributions of the sharer": self.held,
            "Python, libraries, rows": self.process,
        }

    def _disk(self) -> dict[str, float]:
        fetched = {model.to_fetch.name: model.to_fetch.weights for model in self.models if model.to_fetch}
        return {
            "models": sum(weights.converted for weights in fetched.values() if weights),
            "prefills": self.stored.disk,
            "distributions of the sharer": self.taught.disk,
            "checkpoints": self.schedule.checkpoints(self.recipe.watch.keep) * (4 * self.tensors + self.moments),
            "fuser": 2 * self.tensors,
        }

    def _notes(self) -> Iterator[str]:
        recipe = self.recipe
        for model in {model.to_fetch.name: model.to_fetch for model in self.models if model.to_fetch}.values():
            if model.weights is not None:
                yield (
                    f"{model.name} is not here yet ({model.weights.download / 1e6:,.0f} MB to fetch), so its tokens are "
                    f"estimated. Run `c2c pull {model.name}` first to have them counted"
                )
        if recipe.data.stream:
            yield f"lengths are those of the stream's first {len(self.rows)} rows"
        if not self.live.seconds:
            yield "prefills on disk are mapped into memory that is not counted here, since the system may take it back"
            yield "what of them does not stay in memory is read from disk in every epoch, which the time leaves out"
        if recipe.optim.compile:
            yield "the fuser was measured uncompiled"
        yield f"the run ends sooner if {recipe.watch.patience} validations bring nothing better"
