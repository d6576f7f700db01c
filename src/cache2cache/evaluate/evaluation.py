"""An evaluation from its settings to its report: `c2c eval` as a function."""

from __future__ import annotations

import platform
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from rich.console import Console

from cache2cache import __version__
from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate import folder, names, report, tasks
from cache2cache.evaluate.asking import Tell
from cache2cache.evaluate.build import Ingredients, Systems, build, numbered
from cache2cache.evaluate.calls import Call, read_calls, recorded, whole
from cache2cache.evaluate.forms import kind_of
from cache2cache.evaluate.heard import sharer_statistics
from cache2cache.evaluate.identity import identity_of
from cache2cache.evaluate.items import Item
from cache2cache.evaluate.latency import measure_latency
from cache2cache.evaluate.names import Asked
from cache2cache.evaluate.partners import check_matchable, partners
from cache2cache.evaluate.plan import Plan, make_plan
from cache2cache.evaluate.prefills import Prefills
from cache2cache.evaluate.prepare import Decisions, check_forms, decide
from cache2cache.evaluate.rowfile import read_records
from cache2cache.evaluate.runner import run
from cache2cache.evaluate.schema import LatencyRecord, Report, RowRecord
from cache2cache.evaluate.settings import Machine, Settings
from cache2cache.evaluate.summary import TaskInfo, summarise
from cache2cache.evaluate.tasks.base import Loaded, Split, Task
from cache2cache.evaluate.tasks.load import load
from cache2cache.evaluate.training import no_training_rows
from cache2cache.loading import ADDRESSES
from cache2cache.pipeline import C2C


def evaluate(
    settings: Settings, out: Path, machine: Machine | None = None, *, command: str = "", console: Console | None = None
) -> Report:
    """Run, or go on with, an evaluation, and write its report.

    Args:
        out: folder of rows.jsonl, latency.jsonl, report.json, report.md and report.html.
        command: what was typed, for the report.

    Raises:
        DataError: settings, data or folder are not usable.
        EvaluationError: a system failed on too many rows; or, when the report is written, on all requests whose latency was to
            be measured.
    """
    machine, console = machine or Machine(), console or Console(stderr=True)
    asked = names.parse(settings.systems, settings.controls)
    _check_sharers(settings)
    chosen = _tasks(settings)
    loaded = {name: _load(task, "test", limit, settings, machine) for name, (task, limit) in chosen.items()}
    items = {name: _asked_for(rows.items, settings.answer_tokens) for name, rows in loaded.items()}
    given = {"receiver": settings.receiver_form, "sharer": settings.sharer_form}
    check_forms(given, items)
    _check_rows(asked, chosen, items)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False)

    pair = _pair(settings, machine)
    identity = identity_of(settings, pair, asked, loaded)
    prefills = Prefills(machine.prefills)
    prefills.open([pair.receiver, *pair.sharers])
    with folder.held(out, identity):
        decisions = decide(
            pair, items, lambda name, rows: _training(chosen[name][0], rows, settings, machine), prefills, out,
            given=given, routed_share=settings.routed_share if _asks(asked, "routing") else None,
            batch_size=machine.batch_size, tell=tell,
        )  # fmt: skip
    systems, plan = _systems(pair, items, asked, decisions, prefills, settings, machine.batch_size, tell)
    common: dict[str, Any] = {"settings": identity, "on_batch": lambda _: systems.clear(), "console": console}
    untimed = []
    with recorded(out, command, {one.name: str(one) for one in asked}):
        run(
            plan,
            systems.by_name.values(),
            [task for task, _ in chosen.values()],
            out,
            max_errors=machine.max_errors,
            **common,
        )
        if settings.latency_rows:
            prefills.folder = None  # from here on every prefill is computed when it is needed
            untimed = measure_latency(
                plan, list(systems.by_name.values()), out, requests=settings.latency_rows, **common
            )
    calls = read_calls(out)
    rows = _whole(read_records(out / folder.ROWS, RowRecord), calls, tell)
    found = summarise(
        rows, _whole(read_records(out / folder.LATENCY, LatencyRecord), calls),
        {name: _info(task, loaded[name]) for name, (task, _) in chosen.items()},
        _about(settings, pair, rows, decisions, calls),
    )  # fmt: skip
    report.write(found, rows, out, {(x.task, x.id): x.messages[-1]["content"] for part in items.values() for x in part})
    if untimed:
        raise EvaluationError(
            "no request was answered, so there is no latency", got=", ".join(untimed),
            hint=f"The errors are told above; everything else is in {out / 'report.json'}",
        )  # fmt: skip
    return found


_Record = TypeVar("_Record", RowRecord, LatencyRecord)


def _whole(records: Sequence[_Record], calls: Sequence[Call], tell: Tell = lambda line: None) -> list[_Record]:
    """Those of systems of which none is missing. A part of a system's rows is no sample: the longest are asked first."""
    asked_to_the_end = whole(calls)
    left_out = Counter(one.system for one in records if names.base(one.system) not in asked_to_the_end)
    for name, count in left_out.items():
        tell(f"{name} is left out of the report: it was interrupted after {count} answers. Ask it again to go on.")
    return [one for one in records if one.system not in left_out]


def _tasks(settings: Settings) -> dict[str, tuple[Task, int | None]]:
    """Name → task and how many of its rows to ask.

    Raises:
        DataError: an unknown task, a bad limit, or two tasks of one name.
    """
    chosen: dict[str, tuple[Task, int | None]] = {}
    for text in settings.tasks:
        name, colon, limit = text.rpartition(":")
        limited = bool(colon) and limit.isascii() and limit.isdigit()
        task = tasks.get(name if limited else text)
        if task.name in chosen:
            raise DataError("a task was asked for twice", got=task.name, hint="Rename one of the files")
        chosen[task.name] = task, int(limit) if limited else settings.limit
    return chosen


def _check_rows(
    asked: Sequence[Asked], chosen: Mapping[str, tuple[Task, int | None]], items: Mapping[str, Sequence[Item]]
) -> None:
    """Refuse what the rows cannot give, before any model is loaded."""
    if _asks(asked, "mismatched"):
        for rows in items.values():
            check_matchable(rows)
    if _asks(asked, "routing"):
        learned = {kind_of(items[name][0]) for name, (task, _) in chosen.items() if "train" in task.sources}
        if {kind_of(rows[0]) for rows in items.values()} - learned:
            raise no_training_rows()


def _check_sharers(settings: Settings) -> None:
    if elsewhere := [sharer for sharer in settings.sharers if sharer.startswith(ADDRESSES)]:
        raise DataError(
            "an evaluation asks the sharer alone, too, and keeps what it has read, so it needs the sharer's weights",
            got=", ".join(elsewhere), hint="Give the model's name; `c2c serve` listens to sharers elsewhere",
        )  # fmt: skip


def _pair(settings: Settings, machine: Machine) -> C2C:
    return C2C.from_pretrained(
        settings.receiver, settings.sharers, settings.fusers, device=machine.device, mode=settings.mode,
        sharer_device=machine.sharer_device, dtype=settings.dtype, trust_remote_code=machine.trust_remote_code,
    )  # fmt: skip


def _load(task: Task, split: Split, limit: int | None, settings: Settings, machine: Machine) -> Loaded:
    return load(task, split=split, data_dir=machine.data_dir, limit=limit, seed=settings.seed)


def _asked_for(items: Sequence[Item], answer_tokens: int) -> list[Item]:
    return [replace(item, max_new_tokens=answer_tokens) if item.letters else item for item in items]


def _training(task: Task, rows: int, settings: Settings, machine: Machine) -> Sequence[Item]:
    return _load(task, "train", rows, settings, machine).items if "train" in task.sources else []


def _asks(asked: Sequence[Asked], *wanted: str) -> bool:
    return any(one.name in wanted for one in asked)


def _systems(
    pair: C2C,
    items: Mapping[str, Sequence[Item]],
    asked: Sequence[Asked],
    decisions: Decisions,
    prefills: Prefills,
    settings: Settings,
    batch_size: int,
    tell: Tell,
) -> tuple[Systems, Plan]:
    """The systems, and which rows they are asked."""
    tokenizer = pair.sharers[0].tokenizer

    def length(item: Item) -> int:
        return len(tokenizer(item.messages[-1]["content"], add_special_tokens=False)["input_ids"])  # type: ignore[arg-type]

    partner = {}
    if _asks(asked, "mismatched"):
        for name, rows in items.items():
            by_id = {item.id: item for item in rows}
            partner[name] = {row: by_id[other] for row, other in partners(rows, length).items()}
    systems = build(
        Ingredients(
            pair, prefills, decisions.of("receiver"),
            [decisions.of(numbered("sharer", i)) for i in range(len(pair.sharers))],
            settings.seed, settings.message_tokens, decisions.routers, partner,
            lambda of: {
                name: sharer_statistics(of, rows, prefills, batch_size=batch_size, tell=tell)
                for name, rows in items.items()
            },
        ),
        asked,
    )  # fmt: skip
    limits = {one.name: one.limit for one in asked if one.limit is not None}
    plan = make_plan(
        items, list(systems.by_name), length, batch_size=batch_size,
        limits={name: limits[base] for name in systems.by_name if (base := systems.base[name]) in limits},
        paired=[name for name in systems.by_name if name == "mismatched"],
    )  # fmt: skip
    return systems, plan


def _info(task: Task, loaded: Loaded) -> TaskInfo:
    return TaskInfo(task.title, task.kind, task.licence, loaded.source, loaded.dropped, task.metrics, task.primary)


def _about(
    settings: Settings, pair: C2C, rows: Sequence[RowRecord], decisions: Decisions, calls: Sequence[Call]
) -> dict[str, Any]:
    """What was run, on what."""
    import transformers

    said = whole(calls)
    return {
        **settings.model_dump(mode="json"),
        "systems": [text for name, text in said.items() if name in names.SYSTEMS],
        "controls": [text for name, text in said.items() if name in names.CONTROLS],
        **decisions.summary(),
        "definitions": {name: names.definition(name) for name in sorted({row.system for row in rows})},
        "dtypes": {lm.card.id: str(lm.dtype).removeprefix("torch.") for lm in (pair.receiver, *pair.sharers)},
        "fuser_parameters": [fuser.parameter_count() for fuser in pair.fusers],
        "commands": list(dict.fromkeys(call.command for call in calls if call.command)),
        "versions": {
            "cache2cache": __version__, "torch": torch.__version__, "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "machine": {"processor": platform.processor() or platform.machine(), "threads": torch.get_num_threads(),
                    "device": str(pair.receiver.device)},
        "peak_memory_bytes": _peak_memory(),
        "started": calls[0].started,
        "seconds": round(sum(call.seconds for call in calls), 1),
    }  # fmt: skip


def _peak_memory() -> dict[str, int]:
    """Of this process, since it began, by device."""
    peak = {}
    if sys.platform != "win32":
        import resource

        # Linux counts in KiB, macOS in bytes.
        unit = 1 if sys.platform == "darwin" else 1024
        peak["cpu"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if torch.cuda.is_available():
        peak["cuda"] = sum(torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count()))
    return peak
