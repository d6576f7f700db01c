"""Fusers on disk and on the hub: found, loaded strictly, saved atomically, uploaded.

A fuser is a folder with `fuser.safetensors` and `fuser_config.json`. Published checkpoints are read too.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from pathlib import Path

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from cache2cache import __version__
from cache2cache.errors import FuserFormatError
from cache2cache.fuser import published
from cache2cache.fuser.base import FORMAT_VERSION, Fuser, FuserConfig
from cache2cache.fuser.hub import locate, upload
from cache2cache.fuser.strict import check_weights, in_words
from cache2cache.models import disk
from cache2cache.types import torch_dtype

CONFIG = "fuser_config.json"
WEIGHTS = "fuser.safetensors"

State = Mapping[str, torch.Tensor]


def load_fuser(
    location: str | os.PathLike[str], *, revision: str | None = None, dtype: str | torch.dtype | None = torch.float32
) -> Fuser:
    """Load a fuser in eval mode; see `Fuser.from_pretrained`.

    Args:
        dtype: of the weights in memory, or its name; None and "auto" keep them as they are stored.

    Raises:
        ModelError: no dtype of this name.
        FuserFormatError: no fuser there, or one that is damaged, unsafe, incomplete, of an unknown layout or with
            weights that are not finite.
        DownloadError: the hub did not answer, or has no such repository.
    """
    if isinstance(dtype, str):
        dtype = None if dtype == "auto" else torch_dtype(dtype)
    folder = locate(location, revision)
    config, state = _read(folder)
    return assemble(config, state, dtype, folder)


def save_fuser(fuser: Fuser, folder: str | os.PathLike[str], *, dtype: torch.dtype | None = None) -> Path:
    """Write the two files of a fuser, both or neither; other files in the folder stay.

    Args:
        dtype: of the weights on disk; as they are by default.

    Raises:
        FuserFormatError: there is a file in the folder's place.
    """
    folder = destination(folder)
    state = {name: x.detach().to("cpu", dtype or x.dtype).contiguous() for name, x in fuser.state_dict().items()}
    config = fuser.config.model_copy(update={"package_version": __version__})
    with staged(folder, last=CONFIG) as stage:
        save_file(state, stage / WEIGHTS, metadata={"format": "pt"})
        disk.share(stage / WEIGHTS)
        (stage / CONFIG).write_text(config.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return folder


def push_fuser(fuser: Fuser, repo_id: str, *, private: bool = False, dtype: torch.dtype | None = None) -> str:
    """Upload a fuser to a hub repository, made if it is not there. Returns the commit's address.

    Raises:
        DownloadError: the hub did not answer or did not accept it.
    """
    with tempfile.TemporaryDirectory() as folder:
        save_fuser(fuser, folder, dtype=dtype)
        pair = f"{fuser.config.receiver.id} ← {fuser.config.sharer.id}"
        return upload(Path(folder), repo_id, private=private, message=f"Fuser {pair}")


def assemble(config: FuserConfig, state: State, dtype: torch.dtype | None, source: object) -> Fuser:
    """A fuser with the given weights, in eval mode.

    Raises:
        FuserFormatError: tensors that are missing, unexpected, of another shape or not finite; all are named.
    """
    with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
        fuser = Fuser.from_config(config)
    check_weights(source, {name: x.shape for name, x in fuser.state_dict().items()}, state)
    dtype = dtype or _stored_dtype(state)
    fuser.load_state_dict({name: x.to(dtype) for name, x in state.items()}, assign=True)
    return fuser.to(dtype).eval()


def destination(folder: str | os.PathLike[str]) -> Path:
    """The folder to save to, which loading finds under the same name.

    Raises:
        FuserFormatError: it, or a folder that it is to lie in, is a file.
    """
    path = Path(folder).expanduser()
    there = next(x for x in (path.absolute(), *path.absolute().parents) if x.exists())
    if not there.is_dir():
        raise FuserFormatError("a fuser is saved as a folder, not as a file", got=there, hint="Name a new folder")
    return path


@contextmanager
def staged(folder: Path, *, last: str) -> Iterator[Path]:
    """A temporary folder beside `folder` to write into; at the end its files take their places all together.

    Args:
        last: the file without which the folder is not a fuser. Over an older fuser it is removed first and put back
            last, so that an interruption never leaves new weights under an old config.
    """
    folder = folder.absolute()
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}.partial-", dir=folder.parent) as temporary:
        stage = Path(temporary) / folder.name
        stage.mkdir()
        yield stage
        if not folder.exists():
            stage.rename(folder)
            return
        (folder / last).unlink(missing_ok=True)
        files = [path.relative_to(stage) for path in stage.rglob("*") if path.is_file()]
        for name in sorted(files, key=lambda path: path == Path(last)):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (stage / name).replace(folder / name)


def _read(folder: Path) -> tuple[FuserConfig, State]:
    if (folder / CONFIG).is_file():
        return read_config(folder / CONFIG), read_weights(folder / WEIGHTS)
    if published.find(folder):
        return published.read(folder)
    found = sorted(path.name for path in folder.iterdir())
    raise FuserFormatError(
        f"{folder} does not hold a fuser",
        got=", ".join(found[:12]) + (" …" if len(found) > 12 else "") if found else "an empty folder",
        allowed=f"{CONFIG} with {WEIGHTS}, or a published checkpoint ({published.MAP} with projector_*.pt)",
    )


def read_config(path: Path) -> FuserConfig:
    """Read `fuser_config.json`.

    Raises:
        FuserFormatError: not JSON, of a newer format, or with fields that are missing, unknown or out of range.
    """
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise FuserFormatError(f"{path} is not JSON", got=str(error)) from error
    version = raw.get("format_version", FORMAT_VERSION) if isinstance(raw, dict) else None
    if isinstance(version, int) and version > FORMAT_VERSION:
        raise FuserFormatError(
            f"{path} was written by a newer version of cache2cache",
            got=f"format {version} by cache2cache {raw.get('package_version', '?')}",
            allowed=f"format {FORMAT_VERSION}",
            hint="pip install --upgrade cache2cache",
        )
    try:
        return FuserConfig.model_validate(raw)
    except ValidationError as error:
        raise FuserFormatError(f"{path} is not a fuser's config", got=in_words(error)) from error


def read_weights(path: Path) -> State:
    """Read `fuser.safetensors`.

    Raises:
        FuserFormatError: not there, truncated, or a pickle.
    """
    if not path.is_file():
        pickles = sorted(x.name for x in path.parent.iterdir() if x.suffix in (".pt", ".pth", ".bin", ".pkl", ".ckpt"))
        raise FuserFormatError(
            f"{path.parent} has no {path.name}",
            got=", ".join(pickles) or None,
            hint="Pickles can run code and are not read"
            if pickles
            else "The fuser was not saved or fetched to the end",
        )
    with path.open("rb") as file:
        head = file.read(9)
    # The length of a safetensors header, 8 bytes, may begin like a pickle; behind it stands the header's brace.
    if head[:2] in (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05") and head[8:] != b"{":
        raise FuserFormatError(f"{path} is a pickle, which can run code", allowed="safetensors")
    try:
        return load_file(path)
    except SafetensorError as error:
        raise FuserFormatError(
            f"{path} is damaged or was not fetched to the end", got=str(error), hint="Fetch or save it again"
        ) from error


def _stored_dtype(state: State) -> torch.dtype:
    """The dtype that holds all tensors without loss."""
    return reduce(torch.promote_types, {x.dtype for x in state.values()})
