"""Fused caches on their way to vLLM: what arrives is what was put, nobody else sees it, and nothing stays behind."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cache2cache.errors import PayloadError, RequestError
from cache2cache.models import kv
from cache2cache.serve.vllm.store import OwnStore, Store, salt

DIGEST = "0" * 64


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "caches")


@pytest.fixture
def cache():
    """Three layers, two rows, two heads, seven positions of four numbers."""
    sides = torch.arange(3 * 2 * 2 * 2 * 7 * 4, dtype=torch.float32).view(3, 2, 2, 2, 7, 4)
    return kv.from_tensors([(layer[0], layer[1]) for layer in sides])


def names(store: Store) -> list[str]:
    return sorted(path.name for path in store.folder.iterdir() if path.name != "lock")


def test_what_was_put_is_read(store: Store, cache):
    name = store.put(cache, 1, 2, DIGEST)
    with store.open(name) as fused:
        assert (fused.layers, fused.kv_heads, fused.positions, fused.head_dim, fused.digest) == (3, 2, 5, 4, DIGEST)
        for layer in range(3):
            keys, values = fused.read(layer, range(1, 2), range(1, 5))
            expected = (x[1, 1:2, 3:7].transpose(0, 1) for x in kv.layer_tensors(cache, layer))
            for got, want in zip((keys, values), expected, strict=True):
                assert got.shape == (4, 1, 4)
                assert got.is_contiguous()
                assert torch.equal(got, want)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_it_keeps_its_type(store: Store, dtype: torch.dtype):
    layer = torch.randn(1, 1, 3, 4).to(dtype)
    with store.open(store.put(kv.from_tensors([(layer, layer)]), 0, 0, DIGEST)) as fused:
        keys, _ = fused.read(0, range(1), range(3))
        assert torch.equal(keys, layer[0].transpose(0, 1))


def test_contents_have_one_salt_and_others_another(store: Store, cache):
    one, other = store.put(cache, 0, 0, DIGEST), store.put(cache, 0, 0, DIGEST)
    assert salt(one) == salt(store.share(one)) == salt(store.share(one)) != salt(other)


def test_contents_live_as_long_as_any_of_their_names(store: Store, cache):
    first = store.put(cache, 0, 0, DIGEST)
    second = store.share(first)
    store.discard(first)
    with store.open(second) as fused:
        assert fused.positions == 7
    store.discard(second)
    store.discard(second)
    assert names(store) == []


@pytest.mark.parametrize(
    "name",
    ["", "..", "../x", "/etc/passwd", "c2c-" + "0" * 31 + "-0", "c2c-" + "0" * 32, "c2c-" + "0" * 32 + "-0/../x",
     "c2c-" + "0" * 32 + "-0\n", "c2c-" + "A" * 32 + "-0", "c2c-" + "0" * 32 + "-" + "1" * 10],
)  # fmt: skip
def test_a_name_leads_nowhere_else(store: Store, name: str):
    with pytest.raises(PayloadError, match="no name"):
        store.discard(name)
    with pytest.raises(PayloadError, match="no name"), store.open(name):
        pass


def test_what_is_not_there_or_damaged(store: Store, cache):
    name = store.put(cache, 0, 0, DIGEST)
    (store.folder / name).write_bytes(b"\x00" * 100)
    for broken in (name, f"{salt(name)}-7"):
        with pytest.raises(PayloadError, match="cannot be read"), store.open(broken):
            pass


def test_nobody_else_may_look(tmp_path: Path, cache):
    assert Store(tmp_path / "new").folder.stat().st_mode & 0o777 == 0o700
    for mode in (0o755, 0o710, 0o707):
        folder = tmp_path / f"{mode:o}"
        folder.mkdir()
        folder.chmod(mode)
        with pytest.raises(RequestError, match="alone"):
            Store(folder)
    (tmp_path / "link").symlink_to(tmp_path / "new")
    with pytest.raises(RequestError, match="alone"):
        Store(tmp_path / "link")


def test_a_file_that_could_not_be_written_leaves_nothing(store: Store, cache, monkeypatch: pytest.MonkeyPatch):
    def full(tensors, path: Path, metadata) -> None:
        path.write_bytes(b"half")
        raise OSError("No space left on device")

    monkeypatch.setattr("cache2cache.serve.vllm.store.save_file", full)
    with pytest.raises(OSError, match="space"):
        store.put(cache, 0, 0, DIGEST)
    assert names(store) == []


def test_leftovers_are_swept(store: Store, cache):
    store.put(cache, 0, 0, DIGEST)
    (store.folder / "somebody-elses").touch()
    store.sweep()
    assert names(store) == ["somebody-elses"]


class TestOwn:
    def test_folders_of_the_living_stay_and_those_of_the_dead_go(self, tmp_path: Path, cache):
        script = (
            "import os, sys; from pathlib import Path; from cache2cache.serve.vllm.store import OwnStore\n"
            "own = OwnStore(Path(sys.argv[1])); (own.folder / ('c2c-' + '0' * 32 + '-0')).touch(); print(own.folder)\n"
            "sys.stdout.flush(); os._exit(1)"
        )
        died = subprocess.run([sys.executable, "-c", script, tmp_path], capture_output=True, text=True, check=False)
        dead = Path(died.stdout.strip())
        assert dead.is_dir(), died.stderr
        living, another = OwnStore(tmp_path), OwnStore(tmp_path)
        assert not dead.exists()
        name = living.put(cache, 0, 0, DIGEST)
        another.close()
        assert not another.folder.exists()
        assert names(living) == [name]
        living.close()
        assert not living.folder.exists()

    def test_it_lies_in_memory_where_there_is_some(self):
        own = OwnStore()
        try:
            assert own.folder.is_relative_to("/dev/shm" if os.access("/dev/shm", os.W_OK) else "/")
        finally:
            own.close()
