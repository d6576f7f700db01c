"""What training reads from disk is what the request path computes, and is computed once."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from cache2cache import C2C
from cache2cache.errors import DataError, RecipeError
from cache2cache.models import kv, prefills
from cache2cache.models.prefills import PrefillStore
from cache2cache.testing import random_fuser, tiny_pair
from cache2cache.train import prepare, taught
from cache2cache.train.batch import Collator, Example, Teacher
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.features import FeatureDataset, missing, precompute
from cache2cache.train.rows import train_rows
from cache2cache.train.run import train
from cache2cache.train.taught import TeacherStore

CHATS = [
    [{"role": "user", "content": "what is the letter?"}],
    [
        {"role": "system", "content": "answer"},
        {"role": "user", "content": "12 == 12, and the color?"},
        {"role": "assistant", "content": "blue"},
        {"role": "user", "content": "é!"},
    ],
]


@pytest.fixture
def pair():
    """Fresh, so that a test may change it."""
    return tiny_pair()


def c2c_of(pair, **config) -> C2C:
    return C2C(pair[0], [pair[1]], [random_fuser(*pair, **config)])


def rows_of(c2c):
    rows, _ = train_rows([Example(chat, "yes", "", f"row {i}") for i, chat in enumerate(CHATS)], c2c)
    return rows


@pytest.mark.parametrize(
    "config",
    [{}, {"fuse_last": 8}, {"layer_map": (2, 0), "fuse_last": 5}, {"alignment": "retokenise-first"}],
    ids=["native", "last", "mapped", "retokenise"],
)
def test_features_are_what_the_request_path_computes(pair, tmp_path, config):
    c2c = c2c_of(pair, **config)
    rows = rows_of(c2c)
    items = FeatureDataset(rows, c2c, tmp_path)
    assert len(items) == len(rows)
    for i, row in enumerate(rows):
        item, prepared = items[i], c2c.prepare([CHATS[i]])
        (part,) = prepared.sharers
        stop = int(part.due[part.due > 0].min())
        own = kv.stack(kv.prefill(pair[0].model, prepared.ids[:, :stop], prepared.mask[:, :stop]))[:, :, 0]
        cache = kv.prefill(pair[1].model, part.ids, part.mask)
        heard = part.alignment[part.due > 0][None]
        theirs = kv.gather(cache, heard, sorted(set(c2c.fusers[0].config.layer_map)))[:, :, 0]
        assert item.row is row and item.teacher is None
        torch.testing.assert_close(item.own, own, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(item.theirs, theirs, rtol=1e-5, atol=1e-5)
    batch = Collator(c2c)([items[0], items[1]])
    assert batch["own"].shape[4] == batch["due"][batch["due"] > 0].min()
    assert batch["theirs"].shape[1] == len(set(c2c.fusers[0].config.layer_map))


def test_only_what_a_fuser_hears_is_stored(pair, tmp_path):
    c2c = c2c_of(pair, layer_map=(2, 2), fuse_last=4)
    rows = rows_of(c2c)
    FeatureDataset(rows, c2c, tmp_path)
    store = PrefillStore(tmp_path, pair[1].card, pair[1].dtype)
    for row in rows:
        their_ids = row.row.sharers[0].ids
        assert store.holds(their_ids, row.heard_at, [2])
        assert not store.holds(their_ids, None, [2]) and not store.holds(their_ids, row.heard_at)


def test_another_run_computes_only_what_it_adds(pair, tmp_path, monkeypatch):
    read = []
    prefill = prefills.prefill_rows
    monkeypatch.setattr(
        prefills, "prefill_rows", lambda lm, ids, *rest: read.append(lm.card.id) or prefill(lm, ids, *rest)
    )
    wide, narrow = c2c_of(pair, fuse_last=8), c2c_of(pair, fuse_last=4)
    FeatureDataset(rows_of(wide), wide, tmp_path)
    assert set(read) == {"tiny-receiver", "tiny-sharer"}
    read.clear()
    FeatureDataset(rows_of(narrow), narrow, tmp_path)
    assert read == [], "the last 4 of the last 8"
    other = c2c_of(pair, fuse_last=4, layer_map=(0, 2))
    FeatureDataset(rows_of(other), other, tmp_path)
    assert read == ["tiny-sharer"]


def test_a_model_that_is_its_own_sharer_has_one_store(pair, tmp_path):
    c2c = c2c_of((pair[0], pair[0]))
    items = FeatureDataset(rows_of(c2c), c2c, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1
    assert items[0].own.shape[:2] == items[0].theirs.shape[:2]


def test_without_a_folder_features_are_left_to_be_computed(pair, monkeypatch):
    c2c = c2c_of(pair)
    rows = rows_of(c2c)
    monkeypatch.setattr(kv, "prefill", lambda *_: pytest.fail("nothing is to be computed ahead"))
    teachers = [Teacher(torch.zeros(len(row.response), 2), torch.zeros(len(row.response), 2)) for row in rows]
    item = FeatureDataset(rows, c2c, None, teachers)[1]
    assert item.own is None and item.theirs is None
    assert item.teacher is teachers[1]


# --- the sharer's distributions ----------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The rows for which distributions are computed. They are made up, since the store does not look into them."""
    found = []

    def teachers(rows, pair, vocabulary, top):
        for row in rows:
            found.append(row.text)
            seed = torch.Generator().manual_seed(len(row.row.ids))
            ids = torch.randint(0, 50_000, (len(row.response), top), generator=seed)
            logprobs = torch.randn(ids.shape, generator=seed)
            logprobs[0] = -torch.inf
            yield Teacher(ids, logprobs)

    monkeypatch.setattr(taught, "teachers", teachers)
    return found


def test_distributions_are_stored_as_they_are(pair, tmp_path, asked):
    c2c = c2c_of(pair)
    rows = rows_of(c2c)
    expected = taught.taught(rows, c2c, None, 3)
    asked.clear()
    for _ in range(2):
        stored = taught.taught([rows[1], rows[0], rows[1]], c2c, tmp_path, 3)
        assert len(stored) == 3 and len(asked) == 2, "each row once"
        for teacher, like in zip(stored, (expected[1], expected[0], expected[1]), strict=True):
            assert torch.equal(teacher.ids, like.ids) and teacher.ids.dtype == like.ids.dtype
            assert torch.equal(teacher.logprobs, like.logprobs)


def test_the_sharers_distributions_survive_the_disk(pair, tmp_path):
    c2c = c2c_of(pair)
    rows = rows_of(c2c)
    live, stored = taught.taught(rows, c2c, None, 4), taught.taught(rows, c2c, tmp_path, 4)
    for row, a, b in zip(rows, live, stored, strict=True):
        assert a.ids.shape == b.ids.shape == (len(row.response), 4)
        assert torch.equal(a.ids, b.ids)
        torch.testing.assert_close(a.logprobs, b.logprobs, rtol=1e-5, atol=1e-5)


def test_distributions_are_keyed_by_all_that_changes_them(pair, tmp_path, asked):
    c2c = c2c_of(pair)
    (row, _) = rows_of(c2c)
    TeacherStore([row], c2c, tmp_path, 3)
    part = row.row.sharers[0]
    other_prompt = replace(row, row=replace(row.row, sharers=(replace(part, ids=part.ids[1:]),)))
    other_response = replace(row, response=row.response[:-1])
    TeacherStore([other_prompt, other_response, row], c2c, tmp_path, 3)
    assert len(asked) == 3
    TeacherStore([row], c2c, tmp_path, 4)
    assert len(asked) == 4, "other K"
    pair[0].card = pair[0].card.model_copy(update={"tokenizer": "another"})
    TeacherStore([row], c2c, tmp_path, 3)
    assert len(asked) == 5, "another tokenizer of the receiver"


def test_a_damaged_shard_of_distributions_is_named(pair, tmp_path, asked):
    c2c = c2c_of(pair)
    (path,) = TeacherStore(rows_of(c2c), c2c, tmp_path, 3).folder.glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="is damaged") as error:
        TeacherStore(rows_of(c2c), c2c, tmp_path, 3)
    assert str(path) in str(error.value)


# --- c2c features ------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(pair, tmp_path, monkeypatch):
    """A recipe of the tiny pair, with data beside it."""
    models = {"tiny-receiver": pair[0], "tiny-sharer": pair[1]}
    monkeypatch.setattr(prepare, "load", lambda name, **_: models[name])
    lines = [json.dumps({"messages": [*chat, {"role": "assistant", "content": "yes"}]}) for chat in CHATS]
    (tmp_path / "train.jsonl").write_text("\n".join(lines[:1]))
    (tmp_path / "dev.jsonl").write_text("\n".join(lines[1:]))
    data = {"train": [{"path": "train.jsonl"}], "validation": [{"path": "dev.jsonl"}]}
    fuser = {"fuse_last": 4, "sizes": {"width": 16, "inner": 24, "blocks": 1}}
    return Recipe.model_validate({"receiver": "tiny-receiver", "sharer": "tiny-sharer", "fuser": fuser, "data": data})


def test_all_that_a_run_reads_is_computed_ahead(pair, recipe, tmp_path, monkeypatch, capsys, asked):
    machine = Machine(tmp_path, tmp_path / "features", "cpu")
    distilled = recipe.model_copy(update={"objective": recipe.objective.model_copy(update={"distill": 1.0})})
    precompute(distilled, machine)
    said = capsys.readouterr().out
    folders = sorted(path.name for path in (tmp_path / "features").iterdir())
    assert [name.rpartition("-")[0] for name in folders] == ["teacher-tiny-sharer", "tiny-receiver", "tiny-sharer"]
    assert all(f"{name}: " in said for name in folders) and " kB" in said
    c2c = prepare.load_pair(recipe, machine)
    prepared = prepare.prepare_rows(recipe, c2c, machine)
    asked.clear()
    monkeypatch.setattr(kv, "prefill", lambda *_: pytest.fail("something was left to compute"))
    teachers = taught.taught(prepared.train, c2c, machine.features, recipe.objective.distill_top)
    assert FeatureDataset(prepared.train, c2c, machine.features, teachers)[0].teacher is not None
    FeatureDataset(prepared.validation, c2c, machine.features)
    assert asked == []


def test_nothing_can_be_computed_ahead_of_a_stream(recipe, tmp_path):
    optim = recipe.optim.model_copy(update={"max_steps": 4})
    streamed = recipe.model_copy(update={"data": recipe.data.model_copy(update={"stream": True}), "optim": optim})
    with pytest.raises(RecipeError, match=r"data.stream has no features"):
        precompute(streamed, Machine(tmp_path, tmp_path / "features"))
    with pytest.raises(RecipeError, match="features need a folder"):
        precompute(recipe, Machine(tmp_path))


def test_distributions_are_computed_anew_where_a_template_ends_an_answer_otherwise(pair, tmp_path):
    """What the sharer reads is the same."""
    template = (
        "{{ messages[0]['content'] }}{% if messages|length > 1 %}{{ messages[1]['content'] }}<|im_end|>{% endif %}"
    )
    for ending in ("<|im_end|>", "!"):
        c2c = c2c_of(pair, sharer_template=template.replace("<|im_end|>", ending))
        rows = train_rows([Example(CHATS[0], "yes", "", "here")], c2c)[0]
        end = TeacherStore(rows, c2c, tmp_path, 400)[0].logprobs[-1]
        assert bool(end.isfinite().any()) == (ending != "!")


def test_distributions_of_other_weights_are_refused(pair, tmp_path):
    c2c = c2c_of(pair)
    TeacherStore(rows_of(c2c), c2c, tmp_path, 3)
    for weight in pair[1].model.parameters():
        weight.data += 0.5
    with pytest.raises(DataError, match="with other weights of this model"):
        TeacherStore(rows_of(c2c), c2c, tmp_path, 3)


def test_room_for_everything_is_asked_for_before_anything_is_computed(recipe, tmp_path, monkeypatch):
    """Each part of it has room."""
    features = tmp_path / "features"
    machine = Machine(tmp_path, features, "cpu")
    pair = prepare.load_pair(recipe, machine)
    prepared = prepare.prepare_rows(recipe, pair, machine)
    needed = missing([*prepared.train, *prepared.validation], pair, features).size
    parts = [missing(rows, pair, features).size for rows in (prepared.train, prepared.validation)]
    assert needed == sum(parts) > 1.05 * max(parts)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=needed))
    for run in (lambda: precompute(recipe, machine), lambda: train(recipe, tmp_path / "out", machine)):
        with pytest.raises(DataError, match="no room for features on the disk"):
            run()
        assert not list(features.rglob("*.safetensors"))
