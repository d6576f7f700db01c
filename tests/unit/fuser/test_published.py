"""Published checkpoints: there and back without a difference, and what is refused."""

import json
import os
import pickle
import shutil

import pytest
import torch

from cache2cache import Fuser
from cache2cache.errors import FuserFormatError
from cache2cache.fuser import store
from cache2cache.fuser.export import save_published
from cache2cache.fuser.layer_map import depth_normalised
from cache2cache.testing import random_fuser


@pytest.fixture
def paper(receiver, sharer) -> Fuser:
    return random_fuser(receiver, sharer, "paper", alignment="same-ids")


@pytest.fixture
def folder(paper, tmp_path):
    """A published checkpoint of two layers."""
    return save_published(paper, tmp_path / "a+b_Fuser")


def edit(path, function) -> None:
    """Change a JSON file."""
    content = json.loads(path.read_text())
    path.write_text(json.dumps(function(content) or content))


def refused(folder, *words: str) -> None:
    with pytest.raises(FuserFormatError) as caught:
        Fuser.from_pretrained(folder)
    for word in words:
        assert word in str(caught.value)


def contents(folder) -> dict:
    """Everything in a published checkpoint, as values."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.suffix == ".json":
            found[name] = json.loads(path.read_text())
        elif path.suffix == ".pt":
            found |= {f"{name}:{key}": (x.dtype, x.tolist()) for key, x in torch.load(path, weights_only=True).items()}
    return found


def test_layout(folder):
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    assert names == [
        "config.json",
        "final/projector_0.json",
        "final/projector_0.pt",
        "final/projector_1.json",
        "final/projector_1.pt",
        "final/projector_config.json",
    ]
    assert os.path.getsize(folder / "final/projector_0.pt") < 40_000, "a view's whole storage was written"


def test_there_and_back(paper, folder, caches):
    loaded = Fuser.from_pretrained(folder)
    assert (loaded.config.kind, loaded.config.layer_map) == ("paper", paper.config.layer_map)
    assert loaded.config.receiver.id == "tiny-receiver"
    assert loaded.config.sharer.geometry.layers == paper.config.sharer.geometry.layers
    for name, x in paper.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], x)
    assert torch.equal(loaded.delta(*caches(paper)).value, paper.delta(*caches(paper)).value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("alignment", ["same-ids", "retokenise-first", "retokenise-longest"])
def test_convert_and_convert_back(receiver, sharer, tmp_path, dtype, alignment):
    """Published → ours → published: identical tensors, equivalent JSON."""
    layer_map = depth_normalised(receiver.card.geometry.layers, sharer.card.geometry.layers)
    paper = random_fuser(receiver, sharer, "paper", alignment=alignment, layer_map=layer_map).to(dtype)
    paper.gate.anneal(100)
    first = save_published(paper, tmp_path / "first")
    edit(first / "config.json", lambda c: c | {"training": {"seed": 42}, "data": {"type": "X"}})
    ours = store.load_fuser(first, dtype=None)
    assert ours.config.alignment == alignment
    back = store.load_fuser(ours.save_pretrained(tmp_path / "ours"), dtype=None)
    assert contents(save_published(back, tmp_path / "second")) == contents(first)


def test_checks_of_the_pair_still_hold(folder, receiver, sharer):
    Fuser.from_pretrained(folder).check_pair(receiver.card, sharer.card)


@pytest.mark.parametrize("place", ["final", "."])
def test_config_beside_or_above(folder, place, tmp_path):
    if place == ".":
        for path in (folder / "final").iterdir():
            shutil.move(path, folder)
    assert Fuser.from_pretrained(folder / place).config.kind == "paper"


def test_training_folder_and_old_aggregator(folder):
    checkpoint = folder / "checkpoint-10"
    shutil.move(folder / "final", checkpoint)
    (checkpoint / "training_state.pt").write_bytes(b"not read")
    (checkpoint / "aggregator_config.json").write_text("not read")
    assert Fuser.from_pretrained(checkpoint).config.kind == "paper"


def test_only_the_first_of_several_layers_is_used(folder, paper):
    edit(folder / "final/projector_config.json", lambda c: c["0"]["1"]["0"].append([0, 0]))
    assert Fuser.from_pretrained(folder).config.layer_map == paper.config.layer_map


def test_arguments_that_were_not_passed_have_the_published_defaults(folder):
    def drop(card):
        for name in ("initial_temperature", "final_temperature", "anneal_steps", "dropout", "dtype"):
            del card["init_args"][name]

    for i in (0, 1):
        edit(folder / f"final/projector_{i}.json", drop)
    config = Fuser.from_pretrained(folder).config
    assert (config.gate.final_temperature, config.gate.anneal_steps) == (0.001, 1929)
    assert config.sizes["dropout"] == 0.1


# --- what is refused --------------------------------------------------------------------------------------------


class Code:
    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "write", [lambda x, file: pickle.dump(x, file, protocol=2), torch.save], ids=["pickle", "torch.save"]
)
def test_a_pickle_with_code_in_it(folder, write, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with (folder / "final/projector_1.pt").open("wb") as file:
        write({"key_gate_logit": Code()}, file)
    refused(folder, "projector_1.pt", "can run code", "not read")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("content", [b"", b"rubbish", b"PK\x03\x04cut off"])
def test_damaged_weights(folder, content):
    (folder / "final/projector_1.pt").write_bytes(content)
    refused(folder, "projector_1.pt", "damaged")


def test_truncated_weights(folder):
    path = folder / "final/projector_0.pt"
    path.write_bytes(path.read_bytes()[:-2000])
    refused(folder, "projector_0.pt", "damaged")


def test_not_a_state_dict(folder):
    torch.save([1, 2], folder / "final/projector_0.pt")
    refused(folder, "projector_0.pt", "not a state dict")


def test_wrong_tensors_are_named(folder):
    path = folder / "final/projector_1.pt"
    state = torch.load(path, weights_only=True)
    state["key_in.weight"] = state["key_in.weight"].T.contiguous()
    state["key_out"] = state.pop("value_gate_logit")
    state["value_in.bias"][0] = float("nan")
    torch.save(state, path)
    refused(
        folder,
        "projector_1.pt",
        "value_gate_logit is missing",
        "key_out is not expected",
        "key_in.weight has shape (48, 16) instead of (16, 48)",
        "value_in.bias has values that are not finite",
    )


@pytest.mark.parametrize(
    "name", ["config.json", "final/projector_1.pt", "final/projector_1.json", "final/projector_config.json"]
)
def test_missing_file(folder, name):
    (folder / name).unlink()
    refused(folder, "missing" if "config" not in name or name == "config.json" else "does not hold a fuser")


def test_another_class(folder):
    edit(folder / "final/projector_0.json", lambda c: c | {"class": "AllInOneProjector"})
    refused(folder, "projector_0.json", "AllInOneProjector", "C2CProjector")


def test_other_arguments(folder):
    edit(folder / "final/projector_0.json", lambda c: c["init_args"].update(pos_emb=True))
    refused(folder, "projector_0.json", "pos_emb")


def test_projectors_that_differ(folder):
    edit(folder / "final/projector_1.json", lambda c: c["init_args"].update(hidden_dim=24))
    refused(folder, "differ in their arguments", "[0, 1]")


def test_several_sharers(folder):
    edit(folder / "final/projector_config.json", lambda c: c["0"].update({"2": c["0"]["1"]}))
    refused(folder, "maps 2 sharers", "of each pair on its own")


@pytest.mark.parametrize(
    ("layers", "words"),
    [
        ({}, "every receiver layer"),
        ({"0": [[1, 0]], "2": [[2, 1]]}, "every receiver layer"),
        ({"0": [[1, 0]], "1": []}, "every receiver layer"),
        ({"0": [[1, 0]]}, "projectors [1] not named"),
        ({"0": [[1, 0]], "1": [[2, 7]]}, "projectors [1] not named"),
        ({"0": [[-1, 0]], "1": [[2, 1]]}, "leaves the sharer's layers"),
        ({"0": [["a", 0]]}, "published form"),
    ],
)
def test_wrong_layer_map(folder, layers, words):
    edit(folder / "final/projector_config.json", lambda _: {"0": {"1": layers}})
    refused(folder, words)


def test_config_of_something_else(folder):
    (folder / "config.json").write_text('{"model_type": "qwen3"}')
    refused(folder, "config.json", "model: Field required")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "JSON")


# --- what cannot be published -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "config", "words"),
    [
        ("compact", {"alignment": "same-ids"}, "kind compact"),
        ("paper", {}, "alignment native"),
        ("paper", {"alignment": "same-ids", "fuse_last": 4}, "fuse_last"),
        ("paper", {"alignment": "same-ids", "sharer_template": "plain"}, "sharer_template"),
    ],
)
def test_what_the_published_layout_cannot_hold(receiver, sharer, tmp_path, kind, config, words):
    with pytest.raises(FuserFormatError, match=words):
        save_published(random_fuser(receiver, sharer, kind, **config), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []


def test_a_map_that_stops_before_the_sharers_last_layer_cannot_be_published(receiver, sharer, tmp_path):
    """Read back it would say that the sharer has fewer layers, and refuse its own pair."""
    paper = random_fuser(receiver, sharer, "paper", alignment="same-ids", layer_map=(0, 1))
    with pytest.raises(FuserFormatError, match="last layer; got layer 1 as the deepest; allowed: layer 2"):
        save_published(paper, tmp_path / "x")
    assert not (tmp_path / "x").exists()
