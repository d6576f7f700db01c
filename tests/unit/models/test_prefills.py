"""Stored prefills: what is kept, what is had of it, and what happens when something is in the way."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors.torch import save_file

from cache2cache.errors import DataError
from cache2cache.models import filling, kv, prefills, shards
from cache2cache.models.prefills import PrefillStore, by_length, left_padded, prefill_rows, row_key
from cache2cache.testing import tiny_model
from cache2cache.types import Geometry, ModelCard

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8], [9], [10, 11, 12, 13]]
LONG = list(range(20, 32))


@pytest.fixture(scope="module")
def lm():
    """Three layers, two heads."""
    return tiny_model("llama", name="tiny-store")


@pytest.fixture
def opened(lm, tmp_path):
    """The store, as a new process would open it."""
    return lambda: PrefillStore(tmp_path, lm.card, torch.float32)


def fresh(lm, ids) -> torch.Tensor:
    """(2, L, H, n, D)"""
    return kv.stack(kv.prefill(lm.model, torch.tensor([ids]), torch.ones((1, len(ids)))))[:, :, 0]


def part_of(cache: torch.Tensor, positions, layers) -> torch.Tensor:
    cache = cache if layers is None else cache[:, list(layers)]
    return cache if positions is None else cache[:, :, :, list(positions)]


def close(got: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def forbid_prefills(monkeypatch) -> None:
    monkeypatch.setattr(kv, "prefill", lambda *_: pytest.fail("a stored prompt was computed again"))


def test_each_prompt_is_computed_once_and_survives_a_restart(lm, opened, monkeypatch, capsys):
    opened().compute(lm, PROMPTS, batch_tokens=6)
    again = opened()
    with monkeypatch.context() as patch:
        forbid_prefills(patch)
        capsys.readouterr()
        again.compute(lm, PROMPTS)
    assert capsys.readouterr().err == "", "nothing is announced where nothing is done"
    assert len(again) == 4
    for ids in PROMPTS:
        close(again.load(ids), fresh(lm, ids))
    assert not again.holds([7, 7])
    with pytest.raises(DataError, match="no prefill stored"):
        again.load([7, 7])


PARTS = {
    "all": (None, None),
    "last": ([9, 10, 11], None),
    "unordered, repeated": ([5, 3, 3, 4], [2, 0, 0]),
    "some layers": (None, [1]),
    "none": ([], [0, 1]),
    "arrays": (np.array([11, 0]), np.array([2, 1])),
}


@pytest.mark.parametrize(("positions", "layers"), PARTS.values(), ids=PARTS)
@pytest.mark.parametrize("whole", [False, True])
def test_a_part_is_what_the_model_computes_there(lm, opened, positions, layers, whole):
    if whole:
        opened().compute(lm, [LONG])
    opened().compute(lm, [LONG], [positions], layers)
    close(opened().load(LONG, positions, layers), part_of(fresh(lm, LONG), positions, layers))


COVERED = {
    "fewer positions": (([3, 4, 5], None), ([4], None), True),
    "fewer layers": ((None, [0, 2]), (None, [2]), True),
    "a whole prompt spelled out": ((list(range(12)), [0, 1, 2]), (None, None), True),
    "other positions": (([3, 4, 5], None), ([5, 6], None), False),
    "other layers": (([3], [0]), ([3], [1]), False),
    "all positions": (([3, 4], None), (None, None), False),
    "all layers": ((None, [0, 1]), (None, None), False),
    "nothing": (([3], [0]), ([], [0]), True),
}


@pytest.mark.parametrize(("stored", "wanted", "covered"), COVERED.values(), ids=COVERED)
def test_a_record_serves_only_what_it_holds(lm, opened, monkeypatch, stored, wanted, covered):
    opened().compute(lm, [LONG], [stored[0]], stored[1])
    store = opened()
    assert store.holds(LONG, *wanted) is covered
    if covered:
        with monkeypatch.context() as patch:
            forbid_prefills(patch)
            store.compute(lm, [LONG], [wanted[0]], wanted[1])
    else:
        with pytest.raises(DataError, match="no prefill stored"):
            store.load(LONG, *wanted)
        store.compute(lm, [LONG], [wanted[0]], wanted[1])
        assert store.holds(LONG, *stored), "what was there stays"
    close(store.load(LONG, *wanted), part_of(fresh(lm, LONG), *wanted))
    assert len(store) == 1


def test_the_oldest_record_that_has_it_serves(lm, opened, tmp_path):
    """A run that is resumed reads the same bits, whatever others have added meanwhile."""
    writer = opened()
    key = row_key(LONG)
    first, second = torch.full((2, 3, 2, 12, 8), 1.0), torch.full((2, 3, 2, 12, 8), 2.0)
    writer.compute(lm, [LONG], [[0, 1]])
    part = writer.load(LONG, [0])
    writer.add({key: first})
    writer.add({key: second})
    earlier = torch.full_like(first, 0.5)
    for store in (writer, opened()):
        assert torch.equal(store.load(LONG, [0]), part)
        assert torch.equal(store.load(LONG), first)
    save_file({key: earlier}, writer.folder / f"{key}.safetensors")  # as earlier versions named their shards
    assert torch.equal(opened().load(LONG), earlier)


def test_rows_that_share_a_prompt_share_a_record(lm, opened):
    store = opened()
    store.compute(lm, [LONG, LONG, PROMPTS[0]], [[1, 2], [7], None])
    assert len(store) == 2
    close(store.load(LONG, [7, 1]), fresh(lm, LONG)[:, :, :, [7, 1]])


def test_records_of_earlier_versions_are_read(lm, opened):
    """One whole cache per key, in shards without metadata that are named by a digest."""
    store = opened()
    cache = fresh(lm, LONG).contiguous()
    store.folder.mkdir(parents=True)
    save_file({row_key(LONG): cache}, store.folder / f"{row_key(LONG)}.safetensors")
    store = opened()
    assert torch.equal(store.load(LONG), cache)
    assert torch.equal(store.load(LONG, [11], [2]), cache[:, [2]][:, :, :, [11]])


def test_the_folder_of_a_model_keeps_its_name(tmp_path):
    """It is part of the format: with another one, everything that users have stored would be computed again."""
    geometry = Geometry(layers=2, kv_heads=1, head_dim=4, vocab_size=8, max_positions=16)
    store = PrefillStore(tmp_path, ModelCard(id="org/name", geometry=geometry, tokenizer="t"), torch.bfloat16)
    assert store.folder.name == "org--name-c51477f6a4b6"
    assert store.bytes_for(5) == 2 * 2 * 4 * 2 * 5 and store.bytes_for(5, 1) == 2 * 4 * 2 * 5


def test_stores_of_other_models_or_dtypes_are_kept_apart(lm, tmp_path):
    cards = lm.card, lm.card.model_copy(update={"revision": "2"}), lm.card.model_copy(update={"tokenizer": "other"})
    folders = {PrefillStore(tmp_path, c, d).folder for c in cards for d in (torch.float32, torch.bfloat16)}
    assert len(folders) == 6
    assert list(tmp_path.iterdir()) == [], "to look is not to write"


def test_prefills_of_other_weights_are_refused(lm, opened):
    opened().compute(lm, PROMPTS)
    other = tiny_model("llama", seed=1, name="tiny-store")
    assert other.card == lm.card
    with pytest.raises(DataError, match="other weights"):
        opened().compute(other, PROMPTS)
    opened().check(lm)


def test_prompts_are_kept_in_the_models_dtype(tmp_path):
    lm = tiny_model("qwen3")
    lm.model.to(torch.bfloat16)
    store = PrefillStore(tmp_path, lm.card, lm.dtype)
    store.compute(lm, [LONG], [[3]])
    assert store.load(LONG, [3]).dtype == torch.bfloat16


def test_a_store_takes_the_space_that_it_announces(lm, opened, capsys):
    store = opened()
    store.compute(lm, [LONG, PROMPTS[1]], [[3, 4], None], [0, 2])
    announced = store.bytes_for(2 + 5, 2)
    tensors = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    assert announced < tensors < announced + 1000, "besides headers and positions"
    said = capsys.readouterr().err
    assert f"prefills of tiny-store: 2 to compute (17 tokens), {announced / 1000:.0f} kB to store" in said


# --- interruptions and several processes -------------------------------------------------------------------------


@given(lengths=st.lists(st.integers(0, 40), max_size=30), tokens=st.integers(1, 100), data=st.data())
def test_what_some_batches_leave_over_is_split_into_the_others(lengths, tokens, data):
    prompts = [[i] * length for i, length in enumerate(lengths)]
    batches = list(by_length(prompts, tokens))
    assert sorted(i for batch in batches for i in batch) == list(range(len(prompts)))
    left = [batch for batch in batches if data.draw(st.booleans())]
    rest = sorted(i for batch in left for i in batch)
    assert [[rest[i] for i in batch] for batch in by_length([prompts[i] for i in rest], tokens)] == left


def test_a_killed_run_goes_on_to_the_same_bits(lm, tmp_path, monkeypatch):
    monkeypatch.setattr(filling, "_SHARD_RECORDS", 2)
    prompts = [[i] * (1 + i % 7) for i in range(20)]
    places = [[len(ids) - 1] for ids in prompts]
    batches: list[list[list[int]]] = []
    prefill = prefills.prefill_rows
    monkeypatch.setattr(
        prefills, "prefill_rows", lambda lm, rows, *rest: batches.append(rows) or prefill(lm, rows, *rest)
    )
    whole = PrefillStore(tmp_path / "whole", lm.card, torch.float32)
    whole.compute(lm, prompts, places, batch_tokens=12)
    expected, batches = batches, []
    write, written = shards.Shards.write, []

    class Killed(Exception):
        pass

    def dying(self, *args):
        if len(written) == 3:
            raise Killed
        written.append(write(self, *args))

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(shards.Shards, "write", dying)
        PrefillStore(tmp_path / "cut", lm.card, torch.float32).compute(lm, prompts, places, batch_tokens=12)
    kept = PrefillStore(tmp_path / "cut", lm.card, torch.float32)
    assert 0 < len(kept) < 20
    batches.clear()
    kept.compute(lm, prompts, places, batch_tokens=12)
    assert batches == expected[-len(batches) :] and len(batches) < len(expected)
    for ids, at in zip(prompts, places, strict=True):
        assert torch.equal(kept.load(ids, at), whole.load(ids, at))


SHARING = """
import json, sys, torch
from accelerate import PartialState
from cache2cache.models import prefills
from cache2cache.models.prefills import PrefillStore
from cache2cache.testing import tiny_model
torch.set_num_threads(1)
state, lm, read = PartialState(cpu=True), tiny_model("llama", name="tiny-store"), []
prefill = prefills.prefill_rows
prefills.prefill_rows = lambda lm, rows, *rest: read.extend(rows) or prefill(lm, rows, *rest)
store = PrefillStore(sys.argv[1], lm.card, torch.float32)
prompts = [[i] * (1 + i % 7) for i in range(20)]
store.compute(lm, prompts, batch_tokens=12)
assert all(store.holds(ids) for ids in prompts)
print("read", json.dumps(read), flush=True)
state.destroy_process_group()
"""


@pytest.mark.slow
def test_processes_share_the_work(lm, tmp_path):
    (tmp_path / "share.py").write_text(SHARING)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    command += ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0", str(tmp_path / "share.py"), str(tmp_path / "two")]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=200)
    assert done.returncode == 0, done.stderr
    read = [json.loads(line.split(" ", 1)[1]) for line in done.stdout.splitlines() if line.startswith("read")]
    assert len(read) == 2 and all(read)
    assert sorted(read[0] + read[1]) == sorted([i] * (1 + i % 7) for i in range(20)), "each prompt once"
    assert done.stderr.count("to compute") == 1
    one, two = (PrefillStore(tmp_path / name, lm.card, torch.float32) for name in ("one", "two"))
    one.compute(lm, read[0] + read[1], batch_tokens=12)
    for ids in read[0] + read[1]:
        close(two.load(ids), one.load(ids))


def test_processes_that_do_not_share_a_folder_are_told(lm, opened, monkeypatch):
    class Second:
        process_index, num_processes, is_main_process = 1, 2, False

        def wait_for_everyone(self) -> None:
            pass

    monkeypatch.setattr(filling, "PartialState", Second)
    monkeypatch.setattr(filling, "broadcast_object_list", lambda _: [{row_key(ids) for ids in PROMPTS}])
    with pytest.raises(DataError, match=r"what other processes have computed is not in .*2 missing"):
        opened().compute(lm, PROMPTS, batch_tokens=1)


# --- what can be in the way --------------------------------------------------------------------------------------


def spoil(path: Path, how: str, key: str) -> None:
    if how == "cut off":
        path.write_bytes(path.read_bytes()[:-7])
    elif how == "another file":
        path.write_text("not a shard")
    elif how == "empty":
        path.write_bytes(b"")
    elif how == "another shape":
        save_file({key: torch.zeros(2, 3, 2, 11, 8)}, path)
    elif how == "another dtype":
        save_file({key: torch.zeros(2, 3, 2, 12, 8, dtype=torch.float16)}, path)


@pytest.mark.parametrize("how", ["cut off", "another file", "empty", "another shape", "another dtype"])
def test_a_damaged_shard_is_named(lm, opened, how):
    store = opened()
    store.compute(lm, [LONG])
    (path,) = store.folder.glob("*.safetensors")
    spoil(path, how, row_key(LONG))
    with pytest.raises(DataError, match="is damaged") as error:
        opened().load(LONG)
    assert str(path) in str(error.value) and "Delete it" in str(error.value)
    path.unlink()
    again = opened()
    again.compute(lm, [LONG])
    close(again.load(LONG), fresh(lm, LONG))


Usage = namedtuple("Usage", "free")


def test_without_room_nothing_is_computed(lm, opened, monkeypatch, capsys):
    store = opened()
    needed = store.bytes_for(sum(map(len, PROMPTS)))
    forbid_prefills(monkeypatch)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(int(needed * 1.04)))
    with pytest.raises(DataError, match="no room for prefills of tiny-store on the disk"):
        store.compute(lm, PROMPTS)
    assert "4 to compute (13 tokens)" in capsys.readouterr().err


def test_a_disk_that_fills_up_says_so(lm, opened, monkeypatch):
    def full(tensors, path, **_):
        Path(path).write_bytes(b"half")
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    store = opened()
    monkeypatch.setattr(shards, "save_file", full)
    with pytest.raises(DataError, match=r"cannot be written to.*No space left.*Free some space"):
        store.compute(lm, PROMPTS)
    assert {path.suffix for path in store.folder.iterdir()} <= {".json", ".txt"}
    assert len(opened()) == 0


def test_a_file_in_place_of_the_folder(lm, tmp_path):
    (tmp_path / "features").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        PrefillStore(tmp_path / "features", lm.card, torch.float32).compute(lm, PROMPTS)


def test_what_a_killed_process_left_unfinished_is_removed(lm, opened):
    store = opened()
    store.compute(lm, PROMPTS[:1])
    abandoned, current = (store.folder / f"w{i}.safetensors.partial-{i}" for i in (1, 2))
    abandoned.write_bytes(b"")
    current.write_bytes(b"")
    os.utime(abandoned, (time.time() - 7200,) * 2)
    opened().compute(lm, PROMPTS)
    assert not abandoned.exists() and current.exists(), "another process may be writing it"


@pytest.mark.parametrize(
    ("positions", "layers", "said"),
    [([12], None, "positions; got 12–12; allowed: 0–11"), ([-1, 3], None, "positions"), (None, [0, 3], "layers")],
)
def test_parts_that_a_prompt_does_not_have(lm, opened, positions, layers, said):
    with pytest.raises(DataError, match=f"a cache has no such {said}"):
        opened().compute(lm, [LONG], [positions], layers)
    with pytest.raises(DataError, match="a cache has no such"):
        opened().holds(LONG, positions, layers)


# --- batches -----------------------------------------------------------------------------------------------------


def test_rows_of_a_batch_are_read_as_alone(lm):
    caches = prefill_rows(lm, PROMPTS)
    for ids, cache in zip(PROMPTS, caches, strict=True):
        close(cache, fresh(lm, ids))
    parts = prefill_rows(lm, PROMPTS, [[2, 0], None, [], [1]], [2, 1])
    assert [part.shape[3] for part in parts] == [2, 5, 0, 1]
    close(parts[0], caches[0][:, [2, 1]][:, :, :, [2, 0]])


def test_left_padding(lm):
    caches = [fresh(lm, ids) for ids in PROMPTS]
    padded = left_padded(caches)
    assert padded.shape == (2, 3, 4, 2, 5, 8)
    for b, cache in enumerate(caches):
        width = cache.shape[3]
        assert torch.equal(padded[:, :, b, :, 5 - width :], cache)
        assert not padded[:, :, b, :, : 5 - width].any()
