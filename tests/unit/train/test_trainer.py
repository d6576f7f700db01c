"""Training on tiny random models: what is learned is saved, resumed and loaded again, and nothing else changes."""

import json
import random
from pathlib import Path

import pytest
import torch

from cache2cache import C2C, Fuser
from cache2cache.errors import DataError, RecipeError
from cache2cache.inputs import collate
from cache2cache.models import kv
from cache2cache.pipeline import pad_id
from cache2cache.testing import TINY_SIZES, random_fuser, tiny_pair
from cache2cache.train import trainer as training
from cache2cache.train.config import FuserPart, Recipe, read_recipe
from cache2cache.train.data import Collator, FeatureDataset, read_examples, split
from cache2cache.train.features import PrefillStore


@pytest.fixture
def data(tmp_path):
    """Questions whose answer is the choice that says so."""
    draw = random.Random(0)
    rows = []
    for i in range(24):
        answer = draw.randrange(4)
        choices = ["yes" if k == answer else "no" for k in range(4)]
        question = f"number {i}, which?"
        rows.append({"id": str(i), "subject": "t", "question": question, "choices": choices, "answer": answer})
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:16]))
    (tmp_path / "dev.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[16:]))
    return tmp_path


def recipe(**optim) -> Recipe:
    return Recipe.model_validate(
        {
            "receiver": "tiny-receiver",
            "sharer": "tiny-sharer",
            "fuser": {"fuse_last": 8, "sizes": {"width": 16, "inner": 16, "blocks": 1}},
            "data": {"train": [{"path": "train.jsonl"}], "validation": [{"path": "dev.jsonl"}]},
            "optim": {"epochs": 6, "batch_size": 4, "warmup_steps": 2, "learning_rate": 1e-2, "eval_steps": 8}
            | {"patience": 50}
            | optim,
        }
    )


@pytest.fixture
def pair(monkeypatch):
    models = dict(zip(("tiny-receiver", "tiny-sharer"), tiny_pair(), strict=True))
    monkeypatch.setattr(training, "load", lambda name, **_: models[name])
    return models


def assert_same_weights(first: Path, second: Path) -> None:
    """Of the fusers of two runs, statistics included."""
    ours, theirs = (Fuser.from_pretrained(run / "fuser").state_dict() for run in (first, second))
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_training_lowers_the_loss_and_saves_a_fuser_that_fits(pair, data, tmp_path):
    frozen = {n: p.clone() for n, p in pair["tiny-receiver"].model.named_parameters()}
    summary = training.train(recipe(), data, tmp_path / "out", tmp_path / "features")
    history = json.loads(next((tmp_path / "out").glob("checkpoint-24/trainer_state.json")).read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in history if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert summary["rows"] == 16 and summary["steps"] == 24
    fuser = Fuser.from_pretrained(tmp_path / "out" / "fuser")
    assert fuser.config.training["validation_loss"] == summary["validation_loss"]
    fuser.check_pair(pair["tiny-receiver"].card, pair["tiny-sharer"].card)
    for name, parameter in pair["tiny-receiver"].model.named_parameters():
        assert torch.equal(parameter, frozen[name]), f"{name} of the frozen receiver was trained"


@pytest.mark.parametrize("sharer_dropout", [0.0, 0.3])
def test_an_interrupted_run_ends_with_the_same_weights(pair, data, tmp_path, monkeypatch, sharer_dropout):
    whole = recipe(sharer_dropout=sharer_dropout)
    training.train(whole, data, tmp_path / "whole", tmp_path / "features")

    class Killed(Exception):
        pass

    anneal = training.Anneal.on_step_end

    def die(self, args, state, control, **kwargs):
        anneal(self, args, state, control, **kwargs)
        if state.global_step == 12:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training.Anneal, "on_step_end", die)
        training.train(whole, data, tmp_path / "cut", tmp_path / "features")
    training.train(whole, data, tmp_path / "cut", tmp_path / "features", resume=True)
    assert_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_cached_prefills_give_the_request_paths_logits(pair, data, tmp_path):
    """What training fuses from disk is what the pipeline fuses from fresh prefills."""
    receiver, sharer = pair["tiny-receiver"], pair["tiny-sharer"]
    c2c = C2C(receiver, [sharer], [random_fuser(receiver, sharer, fuse_last=8)])
    examples = read_examples(data / "train.jsonl")[:3]
    stores = PrefillStore(tmp_path, receiver.card, torch.float32), PrefillStore(tmp_path, sharer.card, torch.float32)
    dataset = FeatureDataset(examples, c2c, *stores)
    batch = Collator(c2c)([dataset[i] for i in range(3)])
    step = training.TrainingStep(c2c).eval()
    with torch.no_grad():
        logits = step(**batch)["logits"]
    for i, example in enumerate(examples):
        prefill = c2c.prefill(example.messages)
        expected = receiver.model(prefill.ids[:, -1:], past_key_values=prefill.cache).logits[0, -1]
        torch.testing.assert_close(logits[i], expected, rtol=1e-4, atol=1e-4)


def test_a_store_computes_each_prompt_once_and_survives_a_restart(pair, tmp_path, monkeypatch):
    lm = pair["tiny-receiver"]
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8], [9]]
    PrefillStore(tmp_path, lm.card, torch.float32).compute(lm, prompts, batch_tokens=6)
    again = PrefillStore(tmp_path, lm.card, torch.float32)
    monkeypatch.setattr(kv, "prefill", lambda *_: pytest.fail("a stored prompt was computed again"))
    again.compute(lm, prompts)
    assert len(again) == 3
    monkeypatch.undo()
    for ids in prompts:
        fresh = kv.stack(kv.prefill(lm.model, torch.tensor([ids]), torch.ones((1, len(ids)))))[:, :, 0]
        torch.testing.assert_close(again.load(ids), fresh, rtol=1e-5, atol=1e-5)
    with pytest.raises(DataError, match="no prefill stored"):
        again.load([7, 7])


def test_stores_of_other_models_or_dtypes_are_kept_apart(pair, tmp_path):
    receiver, sharer = pair["tiny-receiver"].card, pair["tiny-sharer"].card
    folders = {PrefillStore(tmp_path, c, d).folder for c in (receiver, sharer) for d in (torch.float32, torch.bfloat16)}
    assert len(folders) == 4


def test_contaminated_rows_are_dropped(data):
    held_out = json.loads((data / "train.jsonl").read_text().splitlines()[3])
    (data / "test.jsonl").write_text(json.dumps(held_out) + "\n")
    part = recipe().data.model_copy(update={"held_out": ("test.jsonl",)})
    train, _, dropped = split(data, part, 0)
    assert dropped == 1 and len(train) == 15
    assert held_out["question"] not in {example.question.question for example in train}


def test_contaminated_chats_are_dropped_too(data):
    leaked = json.loads((data / "dev.jsonl").read_text().splitlines()[0])["question"]
    chats = [
        [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}] for text in (leaked, "hi there")
    ]
    (data / "train.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    train, _, dropped = split(data, recipe().data, 0)
    assert dropped == 1 and [example.asked for example in train] == ["hi there"]


def test_chats_are_training_rows_too(tmp_path):
    turns = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}))
    (example,) = read_examples(tmp_path / "chats.jsonl")
    assert example.messages == turns[:1] and example.response == "hello"
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns[:1]}))
    with pytest.raises(DataError, match="does not end with an answer"):
        read_examples(tmp_path / "chats.jsonl")


def test_all_errors_of_a_recipe_are_told_at_once(tmp_path):
    path = tmp_path / "recipe.toml"
    path.write_text('receiver = "r"\nepochs = 3\n[data]\ntrain = []\nvalidation = [{path = "x", limit = -1}]\n')
    with pytest.raises(RecipeError) as error:
        read_recipe(path)
    for field in ("sharer", "epochs", "data.train", "data.validation.0.limit"):
        assert field in str(error.value)
    with pytest.raises(RecipeError, match="no such recipe"):
        read_recipe(tmp_path / "absent.toml")


def test_batches_of_training_rows_are_padded_like_prompts(pair, data, tmp_path):
    receiver, sharer = pair["tiny-receiver"], pair["tiny-sharer"]
    c2c = C2C(receiver, [sharer], [random_fuser(receiver, sharer)])
    stores = PrefillStore(tmp_path, receiver.card, torch.float32), PrefillStore(tmp_path, sharer.card, torch.float32)
    dataset = FeatureDataset(read_examples(data / "train.jsonl")[:2], c2c, *stores)
    batch = Collator(c2c)([dataset[0], dataset[1]])
    expected = collate(dataset.rows, pad_id(receiver), [pad_id(sharer)])
    assert torch.equal(batch["ids"], expected.ids) and torch.equal(batch["due"], expected.sharers[0].due)
    assert batch["own"].shape[4] == batch["ids"].shape[1] - 1


@pytest.mark.parametrize("kind", ["compact", "paper"])
def test_without_its_sharer_a_fuser_learns_nothing_from_the_sharers_caches(pair, data, tmp_path, monkeypatch, kind):
    """Two runs that share the statistics of four rows; in one, every other cache of the sharer's is noise."""
    monkeypatch.setattr(training, "_STATISTICS_ROWS", 4)
    whole = recipe(sharer_dropout=1.0, epochs=2)
    part = FuserPart(kind=kind, fuse_last=8, sizes=TINY_SIZES[kind])
    whole = whole.model_copy(update={"fuser": part})
    losses = [training.train(whole, data, tmp_path / "real", tmp_path / "features")["validation_loss"]]

    load = FeatureDataset.__getitem__

    def noisy(self, index):
        row, response, own, theirs = load(self, index)
        is_sample = len(self) == 16 and index < 4
        return row, response, own, theirs if is_sample else torch.full_like(theirs, 1e3)

    monkeypatch.setattr(FeatureDataset, "__getitem__", noisy)
    losses.append(training.train(whole, data, tmp_path / "noise", tmp_path / "features")["validation_loss"])
    assert_same_weights(tmp_path / "real", tmp_path / "noise")
    assert losses[0] == losses[1], "validation must not hear the sharer either"
    heard = whole.model_copy(update={"optim": whole.optim.model_copy(update={"sharer_dropout": 0.0})})
    assert training.train(heard, data, tmp_path / "heard", tmp_path / "features")["validation_loss"] != losses[0]


def test_the_statistics_are_those_of_the_fused_positions(pair, data, tmp_path):
    """A compact fuser keeps the same means of its mapped layers."""
    receiver, sharer = pair["tiny-receiver"], pair["tiny-sharer"]
    fuser = random_fuser(receiver, sharer, fuse_last=8)
    c2c = C2C(receiver, [sharer], [fuser])
    stores = PrefillStore(tmp_path, receiver.card, torch.float32), PrefillStore(tmp_path, sharer.card, torch.float32)
    dataset = FeatureDataset(read_examples(data / "train.jsonl"), c2c, *stores)
    batch = Collator(c2c)([dataset[i] for i in range(len(dataset))])
    training.standardise(fuser, batch)
    statistics = training.sharer_statistics(sharer, batch)
    assert statistics.count == 16 * 8
    mean = statistics.mean[:, list(fuser.config.layer_map)].float()
    torch.testing.assert_close(mean, fuser.other_mean[:, :, 0], rtol=1e-4, atol=1e-4)


def test_without_dropout_the_sharer_is_not_measured(pair, data, tmp_path, monkeypatch):
    monkeypatch.setattr(training, "sharer_statistics", lambda *_: pytest.fail("statistics that nobody needs"))
    training.train(recipe(epochs=2), data, tmp_path / "out", tmp_path / "features")


def test_the_summary_tells_the_rate(pair, data, tmp_path):
    training.train(recipe(sharer_dropout=0.5, epochs=2), data, tmp_path / "out", tmp_path / "features")
    assert Fuser.from_pretrained(tmp_path / "out" / "fuser").config.training["optim"]["sharer_dropout"] == 0.5


def test_a_receiver_can_be_its_own_sharer(pair, data, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr(training, "load", lambda name, **_: loaded.append(name) or pair[name])
    own = recipe(epochs=2).model_copy(update={"sharer": "tiny-receiver"})
    training.train(own, data, tmp_path / "out", tmp_path / "features")
    assert loaded == ["tiny-receiver"]
    assert len(list((tmp_path / "features").iterdir())) == 1
    fuser = Fuser.from_pretrained(tmp_path / "out" / "fuser")
    receiver = pair["tiny-receiver"]
    c2c = C2C(receiver, [receiver], [fuser])
    messages = [{"role": "user", "content": "hi"}]
    assert not torch.equal(kv.stack(c2c.prefill(messages).cache), kv.stack(c2c.prefill(messages, sharers=[]).cache))
