"""Tensors on disk, in safetensors shards that are written whole or not at all and never changed.

So whatever a killed process has left behind is good, and processes may write to one folder at the same time.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from cache2cache.errors import DataError
from cache2cache.models import disk

_WEIGHTS = "weights.txt"
_ABANDONED = 3600.0
"""Seconds after which a file that was never finished is taken to be a killed process's: writing one takes moments."""


@dataclass(frozen=True)
class Shard:
    """One file, opened."""

    path: Path
    metadata: Mapping[str, str]
    names: frozenset[str]
    _file: Any  # safe_open, which has no public type

    @classmethod
    def open(cls, path: Path) -> Shard:
        """Raise DataError unless it is a whole safetensors file. Tensors are mapped into memory, not read."""
        try:
            file = safe_open(str(path), framework="pt")
            return cls(path, file.metadata() or {}, frozenset(file.keys()), file)
        except (SafetensorError, OSError) as error:
            raise damaged(path, error) from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor. It lies in the file: do not write into it."""
        return self._file.get_tensor(name)


def damaged(path: Path, why: object) -> DataError:
    """The error for a shard that does not hold what it should."""
    return DataError(f"the shard {path} is damaged", got=why, hint="Delete it: what it held will be computed again")


class Shards:
    """The shards of one kind of record, in a folder named after everything that changes the records.

    Args:
        root: folder of all stores.
        name: what the folder's name begins with.
        identity: everything that changes the records, besides their keys; JSON.
        kind: what the identity is, kept beside the shards as `<kind>.json`.

    Raises:
        DataError: a shard is damaged.
    """

    def __init__(self, root: str | Path, name: str, identity: Mapping[str, Any], kind: str):
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = Path(root) / f"{name.replace('/', '--')}-{digest}"
        self._about = f"{kind}.json", json.dumps(identity, indent=1, sort_keys=True)
        self._shards: dict[Path, Shard] = {}
        self._holders: dict[str, list[Shard]] = {}
        self.refresh()

    def holders(self, name: str) -> Sequence[Shard]:
        """The shards with a tensor of this name, in the order in which they were written.

        It is the order of the file names, which begin with the time of writing. Names of earlier versions, which are
        digests, come before all others.
        """
        return self._holders.get(name, ())

    def names(self) -> Iterable[str]:
        """Of all tensors."""
        return self._holders.keys()

    def refresh(self) -> None:
        """Notice the shards that other processes have written."""
        new = set(self.folder.glob("*.safetensors")) - self._shards.keys()
        if new:
            self._shards |= {path: Shard.open(path) for path in new}
            self._holders = {}
            for path in sorted(self._shards):
                self._hold(self._shards[path])

    def write(self, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str] | None = None) -> None:
        """Keep these tensors, all of them or, if interrupted, none.

        Raises:
            DataError: the folder cannot be written to, or its disk is full.
        """
        path = self.folder / f"w{time.time_ns():019d}-{uuid.uuid4().hex[:8]}.safetensors"
        self.put(*self._about)
        with self._whole(path) as partial:
            save_file(dict(tensors), partial, metadata=None if metadata is None else dict(metadata))
            disk.share(partial)
        self._shards[path] = Shard.open(path)
        self._hold(self._shards[path])

    def put(self, name: str, text: str) -> None:
        """Write a small file beside the shards, unless it is there.

        Raises:
            DataError: as `write`.
        """
        if not (self.folder / name).exists():
            with self._whole(self.folder / name) as partial:
                partial.write_text(text)

    def claim(self, weights: str) -> None:
        """Say which weights the records are made with; the first to say so decides.

        Raises:
            DataError: the folder holds records of other weights under this model's name. A model may be trained further in the
                same folder, which its card does not tell.
        """
        self.put(_WEIGHTS, weights)
        if (claimed := (self.folder / _WEIGHTS).read_text()) != weights:
            raise DataError(
                f"{self.folder} was computed with other weights of this model", got=weights, allowed=claimed,
                hint="Choose another folder, or delete this one",
            )  # fmt: skip

    def sweep(self) -> None:
        """Remove what killed processes have left unfinished."""
        for path in self.folder.glob("*.partial*"):
            with contextlib.suppress(FileNotFoundError):
                if time.time() - path.stat().st_mtime > _ABANDONED:
                    path.unlink()

    def _hold(self, shard: Shard) -> None:
        for name in shard.names:
            self._holders.setdefault(name, []).append(shard)

    @contextlib.contextmanager
    def _whole(self, path: Path) -> Iterator[Path]:
        """A path to write to, which becomes `path` if all goes well and is removed if not."""
        partial = path.with_name(f"{path.name}.partial-{os.getpid()}")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.rename(path)
        except (SafetensorError, OSError) as error:
            hint = "Free some space, then start again: what was stored is kept" if disk.is_full(error) else None
            raise DataError(f"the folder {self.folder} cannot be written to", got=error, hint=hint) from error
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)
