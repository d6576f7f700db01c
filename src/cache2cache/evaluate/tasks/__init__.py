"""The benchmarks. Adding one is adding a file with a `TASK` and naming it here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType

from cache2cache.errors import DataError
from cache2cache.evaluate.tasks import (
    arc_challenge,
    arc_easy,
    ceval,
    chats,
    commonsenseqa,
    gsm8k,
    mmlu,
    mmlu_redux,
    openbookqa,
    own,
    squad,
)
from cache2cache.evaluate.tasks.base import Task
from cache2cache.evaluate.tasks.load import load

__all__ = ["TASKS", "get", "load"]

TASKS: Mapping[str, Task] = MappingProxyType(
    {
        module.TASK.name: module.TASK
        for module in (
            arc_easy, arc_challenge, openbookqa, mmlu, mmlu_redux, ceval, commonsenseqa, squad, gsm8k, chats,
        )
    }
)  # fmt: skip
"""Every task by its name."""


def get(name_or_path: str) -> Task:
    """A task by its name, in which case, `-` and `_` do not matter, or the task of a user's file.

    Raises:
        DataError: neither a task nor a file; a file of no known form, or named like a task.
    """
    names = {_key(name): name for name in TASKS}
    if not name_or_path.endswith(own.ENDINGS):
        if _key(name_or_path) in names:
            return TASKS[names[_key(name_or_path)]]
        close = [names[key] for key in difflib.get_close_matches(_key(name_or_path), names, n=3)]
        raise DataError(
            "unknown task",
            got=name_or_path,
            allowed=f"{', '.join(TASKS)}, or a file that ends in {' or '.join(own.ENDINGS)}",
            hint=f"Did you mean {' or '.join(close)}?" if close else None,
        )
    task = own.own_task(Path(name_or_path))
    if _key(task.name) in names:
        raise DataError("a file is named like a built-in task", got=name_or_path, hint="Give it another name")
    return task


def _key(name: str) -> str:
    return re.sub(r"[-_\s]", "", name.lower())
