"""Where fusers come from and go to: the package, folders, the hub."""

from __future__ import annotations

import os
import re
from importlib.resources import files
from pathlib import Path, PurePosixPath

import huggingface_hub
from huggingface_hub.errors import HfHubHTTPError

from cache2cache.errors import DownloadError, FuserFormatError

SHIPPED = ("demo", "general")
"""Fusers in the package, each in a folder NAME_fuser of its data."""

_HUB_ID = re.compile(r"(?P<repo>[\w-][\w.-]*/[\w-][\w.-]*)(?:/(?P<sub>[\w+-][\w.+-]*(?:/[\w+-][\w.+-]*)*))?/?")
_FILES = ("fuser.safetensors", "fuser_config.json", "config.json", "projector_*")
_MARKERS = ("fuser_config.json", "projector_config.json")
"""Files without which a folder is not a fuser."""
_PARTS = ("", "final")
"""A published checkpoint keeps its weights in final/ and its config beside that; its training folders stay out."""
# The first base is the base error of the HTTP client that the hub library uses; lost connections raise it.
_HUB_ERRORS: tuple[type[Exception], ...] = (OSError, ValueError, HfHubHTTPError.__bases__[0])


def locate(location: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The local folder of a fuser, fetched first if it is on the hub.

    Args:
        location: `demo` or `general`, a folder, or a hub id `org/repo` or `org/repo/folder`.
        revision: branch, tag or commit of a hub id; nothing else has any.

    Raises:
        FuserFormatError: nothing of this name, or a revision of something that is not on the hub.
        DownloadError: the hub did not answer, or has no such repository.
    """
    name = os.fspath(location)
    folder = Path(name).expanduser()
    shipped = isinstance(location, str) and name in SHIPPED
    if shipped or (name and folder.is_dir()):
        if revision is not None:
            raise FuserFormatError(
                f"{name} has no revisions", got=f"revision {revision}", allowed="revisions of hub ids",
                hint="Leave the revision out",
            )  # fmt: skip
        return _shipped(name) if shipped else folder
    allowed = f"{', '.join(SHIPPED)}, a folder, a hub id org/repo, or org/repo/folder"
    if name and folder.exists():
        raise FuserFormatError("a fuser is a folder, not a file", got=name, allowed=allowed)
    if isinstance(location, str) and (parts := _HUB_ID.fullmatch(name)):
        return _fetch(parts["repo"], parts["sub"] or "", revision)
    raise FuserFormatError("there is no such fuser", got=repr(name), allowed=allowed)


def _shipped(name: str) -> Path:
    if _holds_fuser(Path(name)):
        raise FuserFormatError(
            f"{name} is a fuser of the package, and the folder {name} here holds another",
            hint=f"Write ./{name} for the folder, or rename it to use the package's",
        )
    folder = Path(str(files("cache2cache.data"))) / f"{name}_fuser"
    if not folder.is_dir():
        raise FuserFormatError(f"this installation has no {name} fuser", hint="Install the released package again")
    return folder


def upload(folder: Path, repo_id: str, *, private: bool, message: str) -> str:
    """Upload a folder's files in one commit and return its address.

    Raises:
        DownloadError: the hub did not answer or did not accept it.
    """
    api = huggingface_hub.HfApi()
    try:
        api.create_repo(repo_id, private=private, exist_ok=True)
        return api.upload_folder(folder_path=folder, repo_id=repo_id, commit_message=message).commit_url
    except _HUB_ERRORS as error:
        raise DownloadError(
            f"the fuser could not be uploaded to {repo_id}",
            got=_first_line(error),
            hint="Log in with `hf auth login`, and check the name and the network",
        ) from error


def _fetch(repo: str, sub: str, revision: str | None) -> Path:
    inside = PurePosixPath(sub)
    patterns = [str(inside / part / file) for part in _PARTS for file in _FILES]
    if sub:
        patterns.append(str(inside.parent / "config.json"))
    try:
        root = Path(huggingface_hub.snapshot_download(repo, revision=revision, allow_patterns=patterns))
    except _HUB_ERRORS as error:
        raise DownloadError(
            f"there is no folder {'/'.join(filter(None, (repo, sub)))}, and the hub gives no repository {repo}",
            got=_first_line(error),
            hint="Check the name, the revision and the network; private repositories need `hf auth login`",
        ) from error
    folder = root / sub
    if not _holds_fuser(folder):
        raise FuserFormatError(
            f"the repository {repo} has no fuser in {sub or 'its top folder'}",
            allowed=", ".join(_fusers(repo, revision)) or None,
            hint="Name one as org/repo/folder",
        )
    return folder


def _holds_fuser(folder: Path) -> bool:
    return any((folder / part / marker).is_file() for part in _PARTS for marker in _MARKERS)


def _fusers(repo: str, revision: str | None) -> list[str]:
    """Folders of a repository that hold fusers; empty if the hub does not tell."""
    try:
        names = huggingface_hub.HfApi().list_repo_files(repo, revision=revision)
    except _HUB_ERRORS:
        return []
    folders = {PurePosixPath(name).parent for name in names if PurePosixPath(name).name in _MARKERS}
    return sorted({str(folder.parent if folder.name == "final" else folder) for folder in folders})


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else ''}".rstrip(": ")
