"""How far a run has come: a bar on a terminal, and everywhere a line for each system that has finished a task."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Mapping
from datetime import timedelta
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn
from rich.text import Text


class RunProgress:
    """Progress over rows × systems.

    Systems differ in speed by orders of magnitude, so the remaining time is summed over the systems, each at its own rate.

    Args:
        left: (task, system) → rows that are not answered yet.
        done: rows that are, over all systems.
    """

    def __init__(self, left: Mapping[tuple[str, str], int], done: int, console: Console | None = None):
        self._console = console or Console(stderr=True)
        self._left = Counter(left)
        self._rows: Counter[str] = Counter()
        self._seconds: dict[str, float] = defaultdict(float)
        self._bar = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}", markup=False),
            _Remaining(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        total = done + self._left.total()
        self._task = self._bar.add_task("", total=total, completed=done, rate="", end=None)
        self._since = time.monotonic()

    def begin(self, task: str, system: str) -> None:
        """A batch of a task goes to a system."""
        self._since = time.monotonic()
        self._bar.update(self._task, description=f"{task} · {system}")

    def end(self, task: str, system: str, rows: int, errors: int) -> None:
        """It is answered.

        Args:
            rows: of them new.
            errors: of the system on the whole task, so far.
        """
        now = time.monotonic()
        self._seconds[system] += now - self._since
        self._rows[system] += rows
        self._left[task, system] -= rows
        rate = self._rows[system] / max(self._seconds[system], 1e-9)
        self._bar.update(self._task, advance=rows, rate=f"{rate:.3g} rows/s", end=now + self._remaining())
        if self._left[task, system] == 0:
            failed = f", {errors} errors" if errors else ""
            self.say(f"{task} · {system}: done, {rate:.3g} rows/s{failed}")

    def say(self, line: str) -> None:
        """A line of its own, above the bar if there is one."""
        self._bar.console.print(line, markup=False, highlight=False)

    def _remaining(self) -> float:
        """Seconds. Systems that were not asked yet are taken to be as fast as the others are on average."""
        average = sum(self._seconds.values()) / max(self._rows.total(), 1)
        seconds = 0.0
        for (_, system), rows in self._left.items():
            asked = self._rows[system]
            seconds += rows * (self._seconds[system] / asked if asked else average)
        return seconds

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()


class _Remaining(ProgressColumn):
    def render(self, task: Task) -> Text:
        end = task.fields["end"]
        if end is None:
            return Text("-:--:--", style="progress.remaining")
        seconds = max(0, round(end - time.monotonic()))
        return Text(str(timedelta(seconds=seconds)), style="progress.remaining")
