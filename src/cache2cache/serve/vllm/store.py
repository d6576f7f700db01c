"""How fused caches reach vLLM's processes: as files in a folder that only their owner can read, in memory where it can
be. A file lives as long as its request: vLLM may put a request aside and load its cache a second time.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from transformers import DynamicCache

from cache2cache.errors import PayloadError, RequestError
from cache2cache.models import kv

SALT_PREFIX = "c2c-"
"""How the `cache_salt` of every request with a fused cache begins, and its cache's name."""

_NAME = re.compile(r"(c2c-[0-9a-f]{32})-[0-9]{1,9}")
_MEMORY = Path("/dev/shm")


def salt(name: str) -> str:
    """What vLLM must mix into the hashes of a cache's blocks: the same for caches with the same contents, and no others.

    Raises:
        PayloadError: this is no name of a cache.
    """
    match = _NAME.fullmatch(name)
    if match is None:
        raise PayloadError("this is no name of a fused cache", got=repr(name), allowed=f"{SALT_PREFIX}…")
    return match[1]


@dataclass(frozen=True)
class Fused:
    """A fused cache on its way: all tokens of a prompt but the last."""

    layers: int
    kv_heads: int
    positions: int
    head_dim: int
    digest: str
    """Of the whole prompt's token ids, see `payload.ids_digest`."""
    file: Any

    def read(self, layer: int, heads: range, positions: range) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values (P, H, D) of some heads and positions of a layer."""
        h, p = slice(heads.start, heads.stop), slice(positions.start, positions.stop)
        keys, values = (self.file.get_slice(side)[layer, h, p].transpose(0, 1) for side in ("keys", "values"))
        return keys.contiguous(), values.contiguous()


class Store:
    """The fused caches of one vLLM.

    Args:
        folder: made if it is missing; otherwise it must be this user's and closed to others.

    Raises:
        RequestError: a folder that others can read.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self._copies = itertools.count(1)
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        found = folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or stat.S_IMODE(found.st_mode) & 0o077:
            raise RequestError(
                "fused caches are as private as prompts, so their folder must be this user's alone",
                got=f"{folder}, mode {stat.S_IMODE(found.st_mode):o}, owner {found.st_uid}",
                allowed=f"a folder of mode 700, owner {os.getuid()}",
            )

    def put(self, cache: DynamicCache, row: int, start: int, digest: str) -> str:
        """Keep a row's positions from `start` on; returns the name.

        Args:
            digest: of the row's token ids, the last one included.
        """
        name = f"{SALT_PREFIX}{secrets.token_hex(16)}-0"
        layers = [kv.layer_tensors(cache, i) for i in range(len(cache.layers))]
        keys, values = (torch.stack([x[row, :, start:] for x in side]).cpu() for side in zip(*layers, strict=True))
        try:
            save_file({"keys": keys, "values": values}, self._path(name), {"digest": digest})
        except BaseException:
            self.discard(name)
            raise
        return name

    def share(self, name: str) -> str:
        """Another name for the same contents, which live until all their names are discarded."""
        other = f"{salt(name)}-{next(self._copies)}"
        os.link(self._path(name), self._path(other))
        return other

    @contextlib.contextmanager
    def open(self, name: str) -> Iterator[Fused]:
        """Read a cache.

        Raises:
            PayloadError: no name of a cache, or none of that name, or a damaged one.
        """
        path = self._path(name)
        try:
            with safe_open(path, framework="pt") as file:
                layers, heads, positions, size = file.get_slice("keys").get_shape()
                yield Fused(layers, heads, positions, size, file.metadata()["digest"], file)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise PayloadError("a fused cache cannot be read", got=f"{name}: {error}") from error

    def discard(self, name: str) -> None:
        """Forget a cache, if it is there."""
        self._path(name).unlink(missing_ok=True)

    def sweep(self) -> None:
        """Forget all of them, which earlier processes have left."""
        for file in self.folder.glob(f"{SALT_PREFIX}*"):
            file.unlink(missing_ok=True)

    def _path(self, name: str) -> Path:
        salt(name)  # a name that is well-formed leads to no other folder
        return self.folder / name


class OwnStore(Store):
    """A store in a folder of its own, for as long as this process lives. What dead processes have left goes.

    Args:
        base: where; in memory by default, or in the folder for temporary files.
    """

    def __init__(self, base: Path | None = None):
        base = base or (_MEMORY if os.access(_MEMORY, os.W_OK) else Path(tempfile.gettempdir()))
        root = Store(base / f"cache2cache-{os.getuid()}").folder
        with FileLock(root / "lock"):
            for left in root.glob("run-*"):
                _remove_dead(left)
            super().__init__(Path(tempfile.mkdtemp(prefix="run-", dir=root)))
            self._alive = FileLock(self.folder / "lock", thread_local=False)
            self._alive.acquire()

    def close(self) -> None:
        """Forget everything, the folder too."""
        self._alive.release()
        shutil.rmtree(self.folder, ignore_errors=True)


def _remove_dead(folder: Path) -> None:
    try:
        with FileLock(folder / "lock", timeout=0):
            shutil.rmtree(folder, ignore_errors=True)
    except Timeout:
        return
