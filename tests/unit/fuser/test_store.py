"""Fusers on disk: what is saved is what is loaded, and anything else is refused with its reason."""

import json
import os
import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cache2cache import Fuser, __version__
from cache2cache.errors import C2CError, FuserFormatError, ModelError
from cache2cache.fuser import export, store
from cache2cache.models.shards import Shards
from cache2cache.testing import random_fuser
from cache2cache.text.chat import TEMPLATES
from cache2cache.types import TEMPLATE_NAMES

KINDS = ["paper", "compact"]


@pytest.fixture
def folder(fuser, tmp_path):
    """A saved compact fuser."""
    return fuser.save_pretrained(tmp_path / "saved")


@pytest.fixture
def change(folder):
    """Change fields of the saved config."""

    def edit(**fields):
        path = folder / store.CONFIG
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return edit


@pytest.fixture
def reweigh(folder):
    """Change the saved tensors."""

    def edit(function):
        path = folder / store.WEIGHTS
        state = load_file(path)
        save_file(function(dict(state)), path)

    return edit


def refused(folder, *words: str) -> str:
    with pytest.raises(FuserFormatError) as caught:
        Fuser.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value)
    return str(caught.value)


def test_configs_of_earlier_versions_mean_what_they_meant(folder, fuser):
    """Without the fields that came later: how the temperature falls, which gates may open, parts of the compact fuser."""
    path = folder / store.CONFIG
    old = json.loads(path.read_text())
    for field in ("schedule", "kinds", "layers"):
        del old["gate"][field]
    path.write_text(json.dumps(old))
    loaded = Fuser.from_pretrained(folder)
    assert loaded.config == fuser.config
    assert all(torch.equal(x, fuser.state_dict()[name]) for name, x in loaded.state_dict().items())


@pytest.mark.parametrize("kind", KINDS)
def test_round_trip(kind, receiver, sharer, tmp_path, caches):
    fuser = random_fuser(receiver, sharer, kind, fuse_last=4, training={"steps": 7})
    loaded = Fuser.from_pretrained(fuser.save_pretrained(tmp_path / "deep" / "folder"))
    assert loaded.config == fuser.config
    assert not loaded.training
    for name, x in fuser.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)
    assert torch.equal(loaded.delta(*caches(fuser)).value, fuser.delta(*caches(fuser)).value)
    assert loaded.gate.logit.requires_grad
    assert loaded.gate.temperature == fuser.gate.temperature


def test_round_trip_at_half_size(fuser, tmp_path):
    folder = fuser.save_pretrained(tmp_path / "half", dtype=torch.bfloat16)
    assert fuser.dtype == torch.float32, "saving changed the fuser"
    loaded = Fuser.from_pretrained(folder)
    assert all(x.dtype == torch.float32 for x in loaded.state_dict().values())
    torch.testing.assert_close(loaded.leave.weight, fuser.leave.weight, rtol=1e-2, atol=1e-3)
    assert Fuser.from_pretrained(folder, dtype=torch.bfloat16).dtype == torch.bfloat16
    assert store.load_fuser(folder, dtype=None).dtype == torch.bfloat16


@pytest.mark.skipif(os.name == "nt", reason="modes are those of POSIX")
@pytest.mark.parametrize("mode", [0o755, 0o750, 0o700])
def test_who_may_read_the_folder_may_read_the_weights(fuser, tmp_path, mode):
    """safetensors makes files for their owner alone, which nobody else on a cluster could load."""
    umask = os.umask(0o777 & ~mode)
    try:
        folder = fuser.save_pretrained(tmp_path / "shared")
        kept = Shards(tmp_path / "features", "tiny", {}, "model")
        kept.write({"a": torch.zeros(2)})
    finally:
        os.umask(umask)
    for path in (*folder.iterdir(), *kept.folder.glob("*.safetensors")):
        assert path.stat().st_mode & 0o777 == mode & 0o666, path


def test_dtypes_by_name(fuser, tmp_path):
    folder = fuser.save_pretrained(tmp_path / "half", dtype=torch.float16)
    for name, dtype in (("auto", torch.float16), ("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        assert Fuser.from_pretrained(folder, dtype=name).dtype == dtype
    with pytest.raises(ModelError, match="unknown dtype; got int8"):
        Fuser.from_pretrained(folder, dtype="int8")


SAVE = pytest.mark.parametrize("save", [store.save_fuser, export.save_published])


@SAVE
def test_a_fuser_is_found_where_it_was_saved(save, receiver, sharer, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    fuser = random_fuser(receiver, sharer, "paper", alignment="same-ids")
    assert save(fuser, "~/deep/saved") == tmp_path / "deep/saved"
    assert Fuser.from_pretrained("~/deep/saved").config.layer_map == fuser.config.layer_map


@SAVE
@pytest.mark.parametrize("place", ["file", "file/folder"])
def test_a_file_is_no_place_for_a_fuser(save, place, receiver, sharer, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(FuserFormatError, match=r"saved as a folder, not as a file; got .*/file\. Name"):
        save(random_fuser(receiver, sharer, "paper", alignment="same-ids"), tmp_path / place)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_saved_fuser_may_have_the_name_of_one_of_the_package(fuser, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fuser.save_pretrained("demo")
    for location in (Path("demo"), "./demo"):
        assert Fuser.from_pretrained(location).config == fuser.config
    refused("demo", "the folder demo here", "./demo")


PICKLE_LIKE = [b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05"]


@pytest.mark.parametrize("start", PICKLE_LIKE)
def test_a_header_as_long_as_pickles_begin(folder, fuser, start):
    path = folder / store.WEIGHTS
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    length = 0x10000 + int.from_bytes(start, "little")
    path.write_bytes(length.to_bytes(8, "little") + data[8:end].ljust(length) + data[end:])
    assert path.read_bytes()[:2] == start
    assert torch.equal(Fuser.from_pretrained(folder).leave.weight, fuser.leave.weight)


def test_a_loaded_fuser_can_be_trained(folder, caches):
    fuser = Fuser.from_pretrained(folder).train()
    fuser.delta(*caches(fuser)).value.sum().backward()
    assert fuser.enter.weight.grad.any()


def test_the_writer_signs(folder):
    assert json.loads((folder / store.CONFIG).read_text())["package_version"] == __version__


def test_saving_again_replaces_both_files_and_nothing_else(folder, receiver, sharer):
    (folder / "notes.txt").write_text("mine")
    other = random_fuser(receiver, sharer, "paper", seed=3)
    other.save_pretrained(folder)
    assert (folder / "notes.txt").read_text() == "mine"
    assert Fuser.from_pretrained(folder).config == other.config
    assert [path.name for path in folder.parent.iterdir()] == ["saved"], "a temporary folder was left behind"


def test_an_interrupted_save_leaves_nothing(fuser, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "save_file", lambda *_, **__: (_ for _ in ()).throw(OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        fuser.save_pretrained(tmp_path / "never")
    assert list(tmp_path.iterdir()) == []


def test_a_save_interrupted_between_its_files_is_no_fuser(folder, receiver, sharer, monkeypatch):
    """New weights under the old config would load and be wrong."""
    real = os.replace
    monkeypatch.setattr(
        "pathlib.Path.replace",
        lambda self, target: (
            real(self, target) if self.name == store.WEIGHTS else (_ for _ in ()).throw(KeyboardInterrupt)
        ),
    )
    with pytest.raises(KeyboardInterrupt):
        random_fuser(receiver, sharer, seed=5).save_pretrained(folder)
    refused(folder, "does not hold a fuser", store.WEIGHTS)


# --- what is refused --------------------------------------------------------------------------------------------


def test_not_a_fuser(tmp_path):
    refused(tmp_path, "does not hold a fuser", "an empty folder", store.CONFIG)
    (tmp_path / "readme.md").write_text("hello")
    refused(tmp_path, "readme.md")


def test_names_that_mean_nothing(tmp_path):
    for name in ("no-such-fuser", str(tmp_path / "missing"), "../up/there", ""):
        refused(name, "no such fuser", "demo, general, a folder, a hub id")
    (tmp_path / "file").write_text("")
    refused(tmp_path / "file", "not a file")


def test_missing_weights(folder):
    (folder / store.WEIGHTS).unlink()
    refused(folder, f"has no {store.WEIGHTS}", "to the end")


def test_pickled_weights_beside_the_config(folder):
    (folder / store.WEIGHTS).unlink()
    torch.save({}, folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "Pickles can run code")


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize("write", [pickle.dump, lambda x, file: torch.save(x, file)], ids=["pickle", "torch.save"])
def test_a_pickle_under_another_name(folder, write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with (folder / store.WEIGHTS).open("wb") as file:
        write(Code(), file)
    refused(folder, "is a pickle", "safetensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("size", [0, 5, 2000, -1])
def test_truncated_weights(folder, size):
    path = folder / store.WEIGHTS
    path.write_bytes(path.read_bytes()[:size])
    refused(folder, str(path), "damaged", "again")


def test_config_is_not_json(folder):
    (folder / store.CONFIG).write_text("{")
    refused(folder, store.CONFIG, "not JSON")


def test_newer_format(change, folder):
    change(format_version=2, package_version="9.9")
    refused(folder, "newer version", "9.9", "pip install --upgrade")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"colour": "red"}, ["colour", "Extra inputs"]),
        ({"kind": "wide"}, ["'wide' is unknown", "paper, compact"]),
        ({"layer_map": [0]}, ["layer_map has 1 entries for 2"]),
        ({"layer_map": [0, 9]}, ["leaves the sharer's layers"]),
        ({"alignment": "by-eye"}, ["alignment", "native"]),
        ({"fuse_last": 0}, ["fuse_last", "greater than 0"]),
        ({"sizes": {"width": -1}}, ["width", "greater than 0"]),
        ({"receiver": {}}, ["receiver.id", "receiver.geometry"]),
        ({"receiver_template": "plane"}, ["receiver_template", "'plane' is no template", "plain, completion, Jinja"]),
        ({"sharer_template": ""}, ["sharer_template", "'' is no template"]),
    ],
)
def test_wrong_config(change, folder, fields, words):
    change(**fields)
    refused(folder, *words)


@pytest.mark.parametrize("side", ["receiver", "sharer"])
@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"kv_heads": -1}, ["kv_heads", "greater than 0"]),
        ({"head_dim": -4}, ["head_dim", "greater than 0"]),
        ({"layers": 0}, ["layers", "greater than 0"]),
        ({"vocab_size": 0}, ["vocab_size", "greater than 0"]),
        ({"rope_of_layer": [0]}, ["rope_of_layer has 1 entries", "one per layer"]),
        ({"ropes": []}, ["rope_of_layer", "there are 0"]),
        ({"ropes": [{"inv_freq": [1.0]}] * 2, "layers": 1, "rope_of_layer": [-1]}, ["rope_of_layer", "there are 2"]),
    ],
    ids=str,
)
def test_wrong_geometry(change, folder, side, sizes, words):
    card = json.loads((folder / store.CONFIG).read_text())[side]
    card["geometry"] |= sizes
    change(**{side: card})
    refused(folder, f"{side}.geometry", *words)


def test_every_template_has_a_name():
    assert set(TEMPLATE_NAMES) == set(TEMPLATES)


def test_config_is_a_list(folder):
    (folder / store.CONFIG).write_text("[]")
    refused(folder, store.CONFIG)


def test_every_wrong_tensor_is_named(reweigh, folder):
    def spoil(state):
        state["extra"] = torch.zeros(1)
        state["enter.bias"] = state["enter.bias"][..., :-1].contiguous()
        state["leave.weight"][0, 0, 0, 0] = float("nan")
        del state["gate.logit"]
        return state

    reweigh(spoil)
    refused(
        folder,
        "gate.logit is missing",
        "extra is not expected",
        "enter.bias has shape (2, 2, 1, 15) instead of (2, 2, 1, 16)",
        "leave.weight has values that are not finite",
    )


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn])
def test_weights_that_are_no_floats(reweigh, folder, dtype):
    reweigh(lambda state: state | {"enter.bias": state["enter.bias"].to(dtype)})
    refused(folder, f"enter.bias has dtype {dtype}", "16 bits")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite(reweigh, folder, value):
    def spoil(state):
        state["own_mean"][0, 0, 0, 0] = value
        return state

    reweigh(spoil)
    refused(folder, "own_mean has values that are not finite")


def test_errors_of_every_kind_are_ours(folder, change):
    """A compact fuser whose card says that keys cannot be rotated back."""
    card = json.loads((folder / store.CONFIG).read_text())["receiver"]
    card["geometry"] |= {"ropes": [], "rope_of_layer": [], "rope_problem": "learned"}
    change(receiver=card)
    with pytest.raises(C2CError, match="learned"):
        Fuser.from_pretrained(folder)
