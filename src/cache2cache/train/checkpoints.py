"""A run's folder: whose it is, and which of its checkpoints are whole.

A checkpoint counts once its marker is there, which is written last and removed first. So a run that is killed at any moment,
also while it saves or deletes, goes on from a whole one. The marker says what belongs to the checkpoint, and which rows were
trained on, so that nothing goes on from less or on other rows.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from cache2cache.errors import TrainingError
from cache2cache.train.config import Recipe
from cache2cache.train.recipes import differences

RECIPE = "recipe.json"
FUSER = "fuser"
DROPPED = "dropped.jsonl"
HALTED = "halted"

_PREFIX = "checkpoint-"
_MARKER = "complete.json"
_STATE = "trainer_state.json"
_ANEW = "Restore it, or give another --output to begin anew"
_BEFORE = "Restore it, or delete it to go on from the checkpoint before it"


@dataclass(frozen=True)
class Checkpoint:
    """A whole one."""

    folder: Path

    @property
    def step(self) -> int:
        """Optimizer steps before it."""
        return _step(self.folder)

    @property
    def processes(self) -> int:
        """How many wrote it together."""
        return self._marker()["processes"]

    @property
    def rows(self) -> str:
        """Digest of the rows that were trained on."""
        return self._marker()["rows"]

    def check(self, remedy: str = _ANEW) -> None:
        """Raise TrainingError, which names a remedy, if files have gone or have another size than when it was whole."""
        for name, size in self._marker()["files"].items():
            path = self.folder / name
            found = path.stat().st_size if path.is_file() else None
            if found != size:
                got = f"no {name}" if found is None else f"{name} of {found:,} bytes"
                raise self._damaged(got, f"{name} of {size:,} bytes", remedy)

    @property
    def ended(self) -> bool:
        """Whether no step was left: all were made, or the validations stopped becoming better."""
        state = self._state()
        stopped = state["stateful_callbacks"]["TrainerControl"]["args"]["should_training_stop"]
        return stopped or state["global_step"] >= state["max_steps"]

    @property
    def best_step(self) -> int | None:
        """The step of the best checkpoint so far."""
        return self._state()["best_global_step"]

    @property
    def state_file(self) -> Path:
        """Trainer's state."""
        return self.folder / _STATE

    def _state(self) -> dict[str, Any]:
        return json.loads(self.state_file.read_text(encoding="utf-8"))

    def _marker(self) -> dict[str, Any]:
        try:
            return json.loads((self.folder / _MARKER).read_text(encoding="utf-8"))
        except ValueError as error:
            raise self._damaged(f"{_MARKER}: {error}", "the JSON that was written", _BEFORE) from error

    def _damaged(self, got: str, allowed: str, remedy: str) -> TrainingError:
        return TrainingError(f"{self.folder} is damaged", got=got, allowed=allowed, hint=remedy)


@contextmanager
def held(output: Path, recipe: Recipe, *, resume: bool) -> Iterator[None]:
    """Hold a run's folder, made if it is not there, for this recipe; checkpoints that are not whole are removed.

    A run that ended before its first checkpoint has left nothing to lose, and another may begin in its place.

    Args:
        resume: whether a run may be in it already, of the same recipe. None need be.

    Raises:
        TrainingError: another process holds the folder, it holds a run and `resume` is false, a run of another recipe or of
            an unknown one, or it cannot be written.
    """
    lock = FileLock(output / ".lock")
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock.acquire(timeout=0)
    except Timeout as error:
        raise TrainingError(
            "another process is writing into the output folder",
            got=output,
            hint="Wait for it, or give another --output",
        ) from error
    except OSError as error:
        raise TrainingError("the output folder cannot be written", got=f"{output}: {error.strerror}") from error
    try:
        _claim(output, recipe, resume)
        yield
    finally:
        lock.release()


def _claim(output: Path, recipe: Recipe, resume: bool) -> None:
    path, anew = output / RECIPE, f"give another --output, or delete {output} to begin anew"
    if path.exists() and (_whole(output) or (output / FUSER).exists()):
        if not resume:
            raise TrainingError("the output folder holds a run", got=output, hint=f"Go on with --resume, {anew}")
        try:
            was = Recipe.model_validate_json(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise TrainingError(f"{path} is damaged", got=error, hint=anew.capitalize()) from error
        if changes := differences(was, recipe):
            raise TrainingError(
                "the output folder holds a run of another recipe", got="; ".join(changes), hint=anew.capitalize()
            )
    elif not path.exists() and (
        left := sorted(x.name for x in output.iterdir() if x.name == FUSER or x.name.startswith(_PREFIX))
    ):
        raise TrainingError(
            f"the output folder holds {', '.join(left)} but no {RECIPE}", got=output, hint=anew.capitalize()
        )
    if not (_whole(output) or (output / FUSER).exists()):
        shutil.rmtree(output / HALTED, ignore_errors=True)  # of a run that left nothing else
    partial = path.with_suffix(".partial")
    partial.write_text(recipe.model_dump_json(indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)
    unfinished = [folder for folder in _folders(output) if not (folder / _MARKER).exists()]
    for folder in [*unfinished, *output.glob(".*.partial-*")]:  # the latter are fusers, see `fuser.store.staged`
        shutil.rmtree(folder)


def to_resume(output: Path) -> Checkpoint | None:
    """The newest whole checkpoint of a run, None if it has none.

    Raises:
        TrainingError: it, or the best one so far, which the run may end with, has been damaged since or is gone.
    """
    whole = _whole(output)
    if not whole:
        return None
    newest = whole[-1]
    newest.check(_BEFORE)
    if newest.best_step not in (None, newest.step):
        best = Checkpoint(folder_of(output, newest.best_step))  # type: ignore[arg-type]
        if not (best.folder / _MARKER).is_file():
            raise TrainingError(
                f"{best.folder} is gone, which has the best weights so far",
                hint=_ANEW,
            )
        best.check()
    return newest


def folder_of(output: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps lies."""
    return output / f"{_PREFIX}{step}"


def complete(folder: Path, processes: int, rows: str) -> None:
    """Declare a checkpoint whole, once everything in it has reached the disk.

    Args:
        rows: digest of the rows that are trained on.
    """
    files = {path: path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file() and path.name != _MARKER}
    for path in files:
        _sync(path)
    named = {path.relative_to(folder).as_posix(): size for path, size in files.items()}
    partial = folder / f"{_MARKER}.partial"
    partial.write_text(json.dumps({"processes": processes, "rows": rows, "files": named}), encoding="utf-8")
    _sync(partial)
    os.replace(partial, folder / _MARKER)
    _sync(folder)


def prune(output: Path, keep: int) -> None:
    """Delete all whole checkpoints but the newest `keep`, and what was the best at each of them: a run may go on from any."""
    whole = _whole(output)
    best = {checkpoint.best_step for checkpoint in whole[-keep:]}
    for checkpoint in whole[:-keep]:
        if checkpoint.step not in best:
            (checkpoint.folder / _MARKER).unlink()
            shutil.rmtree(checkpoint.folder)


def _whole(output: Path) -> list[Checkpoint]:
    return [Checkpoint(folder) for folder in _folders(output) if (folder / _MARKER).exists()]


def _folders(output: Path) -> list[Path]:
    """Of all checkpoints, the oldest first."""
    return sorted((x for x in output.glob(f"{_PREFIX}*") if x.name.removeprefix(_PREFIX).isdigit()), key=_step)


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix(_PREFIX))


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
