"""Fusers on the hub, with the hub's client replaced."""

from pathlib import Path, PurePosixPath

import huggingface_hub
import pytest
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects

from cache2cache import Fuser
from cache2cache.errors import DownloadError, FuserFormatError
from cache2cache.fuser import export, hub
from cache2cache.testing import random_fuser


@pytest.fixture
def served(tmp_path, monkeypatch):
    """A repository, as a folder; what is asked of the hub's client is in its `asked`."""

    class Repository:
        def __init__(self):
            self.folder, self.asked = tmp_path / "repo", {}

        def files(self) -> list[str]:
            return [str(PurePosixPath(p.relative_to(self.folder))) for p in self.folder.rglob("*") if p.is_file()]

    repo = Repository()

    def download(repo_id: str, *, revision: str | None, allow_patterns: list[str]) -> str:
        repo.asked |= {"repo": repo_id, "revision": revision}
        repo.asked["files"] = sorted(filter_repo_objects(repo.files(), allow_patterns=allow_patterns))
        snapshot = tmp_path / "snapshot"
        for name in repo.asked["files"]:
            (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
            (snapshot / name).write_bytes((repo.folder / name).read_bytes())
        snapshot.mkdir(exist_ok=True)
        return str(snapshot)

    class Api:
        def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
            repo.asked |= {"repo": repo_id, "private": private, "exist_ok": exist_ok}

        def upload_folder(self, *, folder_path: Path, repo_id: str, commit_message: str):
            repo.asked["files"] = sorted(path.name for path in Path(folder_path).iterdir())
            repo.asked["message"] = commit_message
            return type("Commit", (), {"commit_url": f"https://hub/{repo_id}/commit/1"})

        def list_repo_files(self, repo_id: str, *, revision: str | None) -> list[str]:
            return repo.files()

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    return repo


def test_a_repository(served, fuser):
    fuser.save_pretrained(served.folder)
    (served.folder / "README.md").write_text("not needed")
    loaded = Fuser.from_pretrained("org/my-fuser", revision="v1")
    assert loaded.config == fuser.config
    assert served.asked == {
        "repo": "org/my-fuser", "revision": "v1", "files": ["fuser.safetensors", "fuser_config.json"]
    }  # fmt: skip


def test_a_folder_of_a_repository(served, fuser):
    for name in ("a", "deep/b"):
        fuser.save_pretrained(served.folder / name)
    assert Fuser.from_pretrained("org/many/deep/b").config == fuser.config
    assert served.asked["files"] == ["deep/b/fuser.safetensors", "deep/b/fuser_config.json"]


@pytest.mark.parametrize("location", ["org/many/a+b_Fuser", "org/many/a+b_Fuser/final"])
def test_a_published_checkpoint(served, receiver, sharer, location):
    fuser = random_fuser(receiver, sharer, "paper", alignment="same-ids")
    export.save_published(fuser, served.folder / "a+b_Fuser")
    training = served.folder / "a+b_Fuser/checkpoint-100"
    training.mkdir()
    (training / "training_state.pt").write_bytes(b"large")
    assert Fuser.from_pretrained(location).config.layer_map == fuser.config.layer_map
    assert "a+b_Fuser/config.json" in served.asked["files"]
    assert not any("training_state" in name for name in served.asked["files"])


def test_a_repository_of_many_names_them(served, fuser, receiver, sharer):
    fuser.save_pretrained(served.folder / "one")
    paper = random_fuser(receiver, sharer, "paper", alignment="same-ids")
    export.save_published(paper, served.folder / "two_Fuser")
    with pytest.raises(FuserFormatError, match="top folder; allowed: one, two_Fuser"):
        Fuser.from_pretrained("org/many")


def test_no_such_repository(monkeypatch):
    def download(*_, **__):
        raise RepositoryNotFoundError("404 Client Error\nand more", response=_response())

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(DownloadError, match=r"no folder runs/mine, and the hub gives no repository runs/mine.*404"):
        Fuser.from_pretrained("runs/mine")


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(DownloadError, match="Check the name, the revision and the network"):
        Fuser.from_pretrained("org/my-fuser")


def test_push(served, fuser):
    assert fuser.push_to_hub("me/my-fuser", private=True) == "https://hub/me/my-fuser/commit/1"
    assert served.asked == {
        "repo": "me/my-fuser", "private": True, "exist_ok": True,
        "files": ["fuser.safetensors", "fuser_config.json"], "message": "Fuser tiny-receiver ← tiny-sharer",
    }  # fmt: skip


def test_push_refused(served, fuser, monkeypatch):
    def create_repo(*_, **__):
        raise RepositoryNotFoundError("401 Unauthorized", response=_response())

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    with pytest.raises(DownloadError, match=r"not be uploaded to me/mine.*401.*hf auth login"):
        fuser.push_to_hub("me/mine")


@pytest.mark.parametrize("name", hub.SHIPPED)
def test_fusers_of_the_package(name):
    config = Fuser.from_pretrained(name).config
    assert (config.kind, config.receiver.id, config.sharer.id) == ("compact", "smollm2-135m", "qwen2.5-coder-1.5b")


def test_only_the_hub_has_revisions(fuser, tmp_path):
    folder = fuser.save_pretrained(tmp_path / "org" / "saved")
    for location in ("demo", str(folder), folder):
        with pytest.raises(FuserFormatError, match=r"has no revisions; got revision v1; allowed: .*hub ids"):
            Fuser.from_pretrained(location, revision="v1")


@pytest.mark.parametrize("name", hub.SHIPPED)
def test_a_fuser_of_the_package_is_missing(name, monkeypatch, tmp_path):
    monkeypatch.setattr(hub, "files", lambda _: tmp_path)
    with pytest.raises(FuserFormatError, match=f"has no {name} fuser"):
        Fuser.from_pretrained(name)


def _response():
    """What the hub's errors want to be made of, in the version that is installed."""
    http = RepositoryNotFoundError.__mro__[2].__module__.split(".")[0]
    module = __import__(http)
    return module.Response(404, request=module.Request("GET", "https://hub/org/x"))
