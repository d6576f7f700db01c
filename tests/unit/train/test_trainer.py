"""Training on tiny random models: what is learned is saved and loaded again, and nothing else changes."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch

from cache2cache import C2C, Fuser
from cache2cache.errors import DataError, ModelError, RecipeError, TrainingError
from cache2cache.models import kv
from cache2cache.testing import TINY_SIZES
from cache2cache.train import statistics, stream
from cache2cache.train.arguments import arguments, device_of
from cache2cache.train.batch import Collator
from cache2cache.train.config import Machine, Recipe
from cache2cache.train.features import FeatureDataset
from cache2cache.train.prepare import load_pair, prepare_rows
from cache2cache.train.run import train
from cache2cache.train.step import TrainingStep
from cache2cache.train.trainer import FuserTrainer


def history(output: Path) -> list[dict]:
    last = max(output.glob("checkpoint-*"), key=lambda x: int(x.name.removeprefix("checkpoint-")))
    return json.loads((last / "trainer_state.json").read_text())["log_history"]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return Fuser.from_pretrained(run / "fuser").state_dict()


def assert_same_weights(first: Path, second: Path) -> None:
    """Of the fusers of two runs, statistics included."""
    theirs = weights(second)
    for name, tensor in weights(first).items():
        assert torch.equal(tensor, theirs[name]), name


def test_training_lowers_the_loss_and_saves_a_fuser_that_fits(models, recipe, machine, tmp_path):
    frozen = {n: p.clone() for n, p in models["tiny-receiver"].model.named_parameters()}
    summary = train(recipe(), tmp_path / "out", machine)
    losses = [entry["eval_loss"] for entry in history(tmp_path / "out") if "eval_loss" in entry]
    assert len(losses) == 3 and losses[-1] < losses[0]
    assert summary["rows"] == 16 and summary["steps"] == 24 and summary["validation_loss"] == round(min(losses), 4)
    fuser = Fuser.from_pretrained(tmp_path / "out" / "fuser")
    assert fuser.config.training == summary
    fuser.check_pair(models["tiny-receiver"].card, models["tiny-sharer"].card)
    for name, parameter in models["tiny-receiver"].model.named_parameters():
        assert torch.equal(parameter, frozen[name]), f"{name} of the frozen receiver was trained"


def test_the_best_weights_are_saved_and_their_checkpoint_is_kept(models, recipe, machine, tmp_path):
    """What training rows teach makes other answers less likely, so the first validations are the best."""
    write_chats(machine.data_dir / "dev.jsonl", [[(f"number {i}", "zz")] for i in range(4)])
    worse = recipe(optim={"epochs": 10}, watch={"keep": 1, "patience": 2})
    summary = train(worse, tmp_path / "out", machine)
    assert summary["best_step"] < summary["steps"] < 40, "two validations without a better one end the run"
    kept = sorted(int(x.name.removeprefix("checkpoint-")) for x in (tmp_path / "out").glob("checkpoint-*"))
    assert kept == [summary["best_step"], summary["steps"]]
    best = Fuser.from_pretrained(tmp_path / "out" / f"checkpoint-{summary['best_step']}").state_dict()
    for name, tensor in weights(tmp_path / "out").items():
        assert torch.equal(tensor, best[name].to(torch.bfloat16).float()), name


def test_a_validation_counts_tokens_not_batches(models, recipe, machine, tmp_path):
    """Chats of unequal length in batches of unequal size."""
    chats = [[("what", "a" * 3**i)] for i in range(4)] + [[("who", "b")]]
    write_chats(machine.data_dir / "dev.jsonl", chats)
    short = recipe(optim={"epochs": 2, "batch_size": 2})
    summary = train(short, tmp_path / "out", machine)
    best = Fuser.from_pretrained(tmp_path / "out" / f"checkpoint-{summary['best_step']}")
    pair = C2C(models["tiny-receiver"], [models["tiny-sharer"]], [best])
    rows = prepare_rows(short, pair, machine).validation
    nats = tokens = 0.0
    for row in rows:
        out = TrainingStep(pair, short.objective).eval()(**Collator(pair)(list(FeatureDataset([row], pair, None))))
        nats, tokens = nats + float(out["nats"].detach()), tokens + float(out["tokens"])
    assert summary["validation_loss"] == pytest.approx(nats / tokens, abs=1e-3)


def test_the_fuser_answers_as_training_measured_it(models, recipe, machine, tmp_path):
    """The likelihood of a validation row through the request path."""
    summary = train(recipe(), tmp_path / "out", machine)
    receiver = models["tiny-receiver"]
    pair = C2C(receiver, [models["tiny-sharer"]], [Fuser.from_pretrained(tmp_path / "out" / "fuser")])
    nats = tokens = 0.0
    for row in prepare_rows(recipe(), pair, machine).validation:
        prefill = pair.read(pair.prepare([[{"role": "user", "content": content_of(row, receiver)}]]))
        response = torch.as_tensor(row.response)
        read = torch.cat([prefill.ids[0, -1:], response[:-1]])[None]
        logprobs = receiver.model(read, past_key_values=prefill.cache).logits[0].log_softmax(-1)
        nats -= float(logprobs.gather(1, response[:, None]).sum())
        tokens += len(response)
    assert nats / tokens == pytest.approx(summary["validation_loss"], abs=0.05)  # the saved weights are bfloat16


def content_of(row, receiver) -> str:
    text = receiver.tokenizer.decode(row.row.ids)
    return text.split("<|im_start|>user\n")[1].split("<|im_end|>")[0]


def test_seeds_may_share_their_rows(models, recipe, machine):
    some = {"train": [{"path": "train.jsonl", "limit": 6}], "validation": [{"path": "dev.jsonl", "limit": 3}]}

    def drawn(seed: int, rows_seed: int | None):
        run = recipe(seed=seed, data=some | {"seed": rows_seed})
        pair = load_pair(run, machine)
        prepared = prepare_rows(run, pair, machine)
        asked = [[row.row.ids.tolist() for row in part] for part in (prepared.train, prepared.validation)]
        return asked, torch.cat([x.flatten() for x in pair.fusers[0].parameters()]).detach()

    (base, weights), (same, others), (own, _) = drawn(0, None), drawn(1, 0), drawn(1, None)
    assert base == same and not torch.equal(weights, others)
    assert base[0] != own[0] and base[1] != own[1]


@pytest.mark.parametrize("kept", [True, False])
def test_a_sharer_whose_prefills_are_kept_gives_its_memory_back(models, recipe, machine, tmp_path, monkeypatch, kept):
    pairs = []

    def watched(*args):
        pairs.append(load_pair(*args))
        return pairs[-1]

    monkeypatch.setattr("cache2cache.train.run.load_pair", watched)
    where = machine if kept else dataclasses.replace(machine, features=None)
    for sharer in ("tiny-sharer", "tiny-receiver"):
        train(recipe(sharer=sharer, optim={"epochs": 1}), tmp_path / sharer, where)
    (other,), (itself,) = pairs[0].sharers, pairs[1].sharers
    assert (other.device.type == "meta") == kept
    assert itself is pairs[1].receiver and itself.device.type == "cpu"


@pytest.mark.parametrize("objective", [{}, {"distill": 1.0, "distill_top": 8}, {"contrastive": 0.5}])
def test_prefills_need_not_be_kept(models, recipe, machine, tmp_path, objective):
    runs = []
    for name, where in (("kept", machine), ("live", Machine(data_dir=machine.data_dir, device="cpu"))):
        train(recipe(optim={"epochs": 2}, objective=objective), tmp_path / name, where)
        runs.append([entry["loss"] for entry in history(tmp_path / name) if "loss" in entry])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


def test_accumulated_batches_are_one_large_batch(models, recipe, machine, tmp_path):
    """Although responses differ in length: the loss is divided by the tokens of the whole step."""
    write_chats(machine.data_dir / "train.jsonl", [[(f"number {i}", "a" * (1 + i * i % 7))] for i in range(16)])
    for name, sizes in (("whole", {"batch_size": 4}), ("parts", {"batch_size": 1, "accumulate": 4})):
        train(recipe(optim=sizes | {"epochs": 2}), tmp_path / name, machine)
    logged = [[e["loss"] for e in history(tmp_path / name) if "loss" in e] for name in ("whole", "parts")]
    assert logged[0] == pytest.approx(logged[1], rel=1e-4)
    parts = weights(tmp_path / "parts")
    for name, tensor in weights(tmp_path / "whole").items():
        torch.testing.assert_close(tensor, parts[name], rtol=2e-2, atol=2e-3)


def test_rows_of_one_length_come_together(models, recipe, machine, tmp_path):
    summary = train(recipe(optim={"bucket": True, "epochs": 2}), tmp_path / "out", machine)
    assert summary["steps"] == 8


def test_weight_decay_and_learning_rates_by_kind_of_parameter(models, recipe, machine, tmp_path):
    gates = {"gate_learning_rate": 0.5, "weight_decay": 0.1}
    learned = recipe(optim=gates, fuser={"gate": {"learned": True}})
    trainer, _ = trainer_of(learned, machine, tmp_path)
    groups = trainer.create_optimizer().param_groups
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    found = {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}
    assert found["fuser.gate.logit"] == (0.5, 0.0)
    assert found["fuser.enter.weight"] == (0.01, 0.1)
    assert found["fuser.enter.bias"] == found["fuser.blocks.0.norm"] == (0.01, 0.0)
    assert len(found) == len(names)


def test_learned_gates_are_watched_and_their_temperature_falls(models, recipe, machine, tmp_path):
    gate = {"learned": True, "anneal_steps": 16, "final_temperature": 0.5, "schedule": "linear"}
    train(recipe(fuser={"gate": gate}), tmp_path / "out", machine)
    logged = [entry for entry in history(tmp_path / "out") if "eval_loss" in entry]
    assert [entry["gate/temperature"] for entry in logged] == pytest.approx([0.75, 0.5, 0.5])
    assert all(0 < entry["gate/values_01"] < 1 for entry in logged)
    assert {"eval_mismatched", "eval_margin", "eval_zeroed", "norm/leave"} <= set(logged[0])


def test_trackers_are_transformers_own(models, recipe, machine, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    train(recipe(optim={"epochs": 2}, watch={"report_to": ["tensorboard"]}), tmp_path / "out", machine)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    events = EventAccumulator(str(folder)).Reload()
    assert {"train/loss", "eval/loss", "eval/mismatched", "train/norm/leave"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [4, 8]


@pytest.mark.parametrize("kind", ["compact", "paper"])
def test_without_its_sharer_a_fuser_learns_nothing_from_the_sharers_caches(
    models, recipe, machine, tmp_path, monkeypatch, kind
):
    """Two runs that share the statistics of four rows; in one, every other cache of the sharer's is noise."""
    monkeypatch.setattr(statistics, "STATISTICS_ROWS", 4)
    part = {"kind": kind, "fuse_last": 8, "sizes": TINY_SIZES[kind]}
    alone = recipe(fuser=part, optim={"sharer_dropout": 1.0, "epochs": 2})
    losses = [train(alone, tmp_path / "real", machine)["validation_loss"]]
    load = FeatureDataset.__getitem__

    def noisy(self, index):
        item = load(self, index)
        if len(self) == 16 and index in statistics.spread(16):
            return item
        return type(item)(item.row, item.own, torch.full_like(item.theirs, 1e3))

    monkeypatch.setattr(FeatureDataset, "__getitem__", noisy)
    losses.append(train(alone, tmp_path / "noise", machine)["validation_loss"])
    assert_same_weights(tmp_path / "real", tmp_path / "noise")
    assert losses[0] == losses[1], "validation must not hear the sharer either"
    heard = recipe(fuser=part, optim={"sharer_dropout": 0.0, "epochs": 2})
    assert train(heard, tmp_path / "heard", machine)["validation_loss"] != losses[0]


def test_a_receiver_can_be_its_own_sharer(models, recipe, machine, tmp_path, monkeypatch):
    loaded = []
    monkeypatch.setattr("cache2cache.train.prepare.load", lambda name, **_: loaded.append(name) or models[name])
    train(recipe(sharer="tiny-receiver", optim={"epochs": 2}), tmp_path / "out", machine)
    assert loaded == ["tiny-receiver"]
    receiver = models["tiny-receiver"]
    pair = C2C(receiver, [receiver], [Fuser.from_pretrained(tmp_path / "out" / "fuser")])
    messages = [{"role": "user", "content": "hi"}]
    fused, plain = pair.prefill(messages).cache, pair.prefill(messages, sharers=[]).cache
    assert not torch.equal(kv.stack(fused), kv.stack(plain))


def test_rows_that_are_left_out_are_named(models, recipe, machine, tmp_path):
    leaked = (machine.data_dir / "train.jsonl").read_text().splitlines()[3]
    (machine.data_dir / "test.jsonl").write_text(leaked + "\n")
    data = {"held_out": ["test.jsonl"], "max_tokens": 120}
    summary = train(recipe(data=data, optim={"epochs": 2}), tmp_path / "out", machine)
    (row,) = [json.loads(line) for line in (tmp_path / "out" / "dropped.jsonl").read_text().splitlines()]
    expected = {"place": "train.jsonl, line 4", "reason": "same question", "held_out": "test.jsonl, line 1"}
    assert row == expected
    assert summary["rows"] == 15 and summary["rows_dropped"] == {"same question": 1}


def test_a_recipe_without_rows_to_train_on_is_refused(models, recipe, machine, tmp_path):
    with pytest.raises(DataError, match="no row is left"):
        train(recipe(data={"max_tokens": 2}), tmp_path / "out", machine)


@pytest.mark.parametrize("stream", [False, True])
def test_rows_of_which_nothing_is_fused_are_refused(models, recipe, machine, tmp_path, stream):
    """A template's ending takes all of the last positions, and it is the messages that are fused one by one."""
    short = recipe(
        fuser={"alignment": "retokenise-first", "fuse_last": 1}, data={"stream": stream}, optim={"max_steps": 4}
    )
    with pytest.raises(
        DataError, match=r"no position of any training row is fused.*fuse_last 1.*Raise fuser\.fuse_last"
    ):
        train(short, tmp_path / "out", machine)


def test_rows_can_come_as_a_stream(models, recipe, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "STATISTICS_ROWS", 16)
    leaked = (machine.data_dir / "train.jsonl").read_text().splitlines()[3]
    (machine.data_dir / "test.jsonl").write_text(leaked + "\n")
    streamed = {"stream": True, "shuffle_buffer": 4, "held_out": ["test.jsonl"]}
    summary = train(recipe(data=streamed, optim={"max_steps": 12}), tmp_path / "out", machine)
    assert summary["steps"] == 12 and summary["rows"] == "a stream"
    assert summary["rows_dropped"] == {"same question": 1}, "three passes, one row"
    assert not (tmp_path / "features").exists()
    losses = [entry["loss"] for entry in history(tmp_path / "out") if "loss" in entry]
    assert losses[-1] < losses[0]


def test_a_stream_can_be_distilled(models, recipe, machine, tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "STATISTICS_ROWS", 16)
    asked, teachers = [], stream.teachers
    monkeypatch.setattr(stream, "teachers", lambda rows, *rest: asked.extend(rows) or teachers(rows, *rest))
    distilled = recipe(
        data={"stream": True},
        optim={"max_steps": 12},
        watch={"eval_steps": 4},
        objective={"distill": 1.0, "response": 0},
    )
    summary = train(distilled, tmp_path / "out", machine)
    assert summary["steps"] == 12
    assert len(asked) == 12 * 4, "neither rows of the validation nor rows read ahead are asked about"
    asked.clear()
    shutil.rmtree(tmp_path / "out" / "checkpoint-12")
    assert train(distilled, tmp_path / "out", machine, resume=True)["steps"] == 12
    assert len(asked) == 4 * 4, "nor rows that a resumed run skips"


def test_a_run_that_explodes_is_halted(models, recipe, machine, tmp_path):
    with pytest.raises(TrainingError, match="rows are in"):
        train(recipe(optim={"learning_rate": 1e6, "warmup_steps": 0}), tmp_path / "out", machine)
    rows = (tmp_path / "out" / "halted" / "rows-0.jsonl").read_text().splitlines()
    assert len(rows) == 4 and "which?" in json.loads(rows[0])["prompt"]
    assert all(json.loads(row)["place"].startswith("train.jsonl, line ") for row in rows)


def test_a_gathered_state_is_saved_in_the_place_of_shards(models, recipe, machine, tmp_path):
    """What FSDP hands over: the whole model's tensors, while the module itself holds only shards."""
    trainer, step = trainer_of(recipe(), machine, tmp_path)
    gathered = {name: torch.full_like(x, 0.5) for name, x in step.state_dict().items()}
    trainer._save(str(tmp_path / "saved"), state_dict=gathered)
    saved = Fuser.from_pretrained(tmp_path / "saved")
    assert all((x == 0.5).all() for x in saved.state_dict().values()) and saved.config == step.fuser.config
    assert sorted(x.name for x in (tmp_path / "saved").iterdir()) == ["fuser.safetensors", "fuser_config.json"]


def test_weights_that_are_missing_from_a_checkpoint_are_an_error(models, recipe, machine, tmp_path):
    train(recipe(optim={"epochs": 2}), tmp_path / "out", machine)
    other = recipe(fuser={"sizes": {"width": 16, "inner": 16, "blocks": 2}})
    trainer, _ = trainer_of(other, machine, tmp_path / "other")
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1"):
        trainer.load_fuser(tmp_path / "out" / "checkpoint-8")


@pytest.mark.parametrize(
    ("fuser", "wrong"), [({"layer_map": [0]}, "1 entries for 2 receiver layers"), ({"layer_map": [0, 9]}, "layers 0–2")]
)
def test_a_fuser_that_does_not_fit_the_pair_is_a_recipes_error(models, recipe, machine, fuser, wrong):
    with pytest.raises(RecipeError, match=wrong):
        load_pair(recipe(fuser=fuser), machine)


def test_several_processes_do_not_share_an_accelerator(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert str(device_of(Machine(device="cuda"))) == "cuda:1" and str(device_of(Machine(device="cpu"))) == "cpu"
    with pytest.raises(RecipeError, match="several processes"):
        device_of(Machine(device="cuda:0"))


@pytest.mark.parametrize("saved", [None, "SHARDED_STATE_DICT"])
def test_checkpoints_that_would_hold_no_fuser_are_refused(recipe, monkeypatch, tmp_path, saved):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    if saved:
        monkeypatch.setenv("FSDP_STATE_DICT_TYPE", saved)
    with pytest.raises(TrainingError, match=r"whole fusers(?s:.*)FULL_STATE_DICT") as error:
        arguments(recipe(), tmp_path, torch.device("cpu"))
    assert error.value.got == (saved or "SHARDED_STATE_DICT")
    monkeypatch.setenv("FSDP_STATE_DICT_TYPE", "FULL_STATE_DICT")
    arguments(recipe(), tmp_path, torch.device("cpu"))


def test_only_the_recipe_says_how_precisely_a_run_computes(recipe, monkeypatch, tmp_path):
    """Also to somebody who has once answered bf16 to `accelerate config`."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(TrainingError, match=r"mixed precision bf16(?s:.*)optim.precision"):
        arguments(recipe(), tmp_path, torch.device("cpu"))
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    arguments(recipe(), tmp_path, torch.device("cpu"))


def test_an_unknown_tracker_is_told_before_anything_is_read(models, recipe, machine, tmp_path):
    with pytest.raises(RecipeError, match=r"watch.report_to(?s:.*)tensorbord"):
        train(recipe(watch={"report_to": ["tensorbord"]}), tmp_path / "out", machine)
    assert not (tmp_path / "features").exists()


def trainer_of(recipe: Recipe, machine: Machine, tmp_path: Path) -> tuple[FuserTrainer, TrainingStep]:
    pair = load_pair(recipe, machine)
    step = TrainingStep(pair, recipe.objective)
    rows = FeatureDataset([], pair, None)
    args = arguments(recipe, tmp_path, torch.device("cpu"))
    return FuserTrainer(step, pair, recipe, args, Collator(pair), rows, rows, None, "rows"), step


def write_chats(path: Path, chats: list[list[tuple[str, str]]]) -> None:
    rows = []
    for chat in chats:
        turns = [(role, text) for turn in chat for role, text in zip(("user", "assistant"), turn, strict=True)]
        rows.append({"messages": [{"role": role, "content": text} for role, text in turns]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_a_run_goes_on_from_a_trained_fuser(models, recipe, machine, tmp_path):
    first = train(recipe(), tmp_path / "first", machine)
    sizes = recipe().fuser.sizes
    further = recipe(fuser={"init": str(tmp_path / "first" / "fuser")}, optim={"epochs": 2, "learning_rate": 1e-4})
    second = train(further, tmp_path / "second", machine)
    assert second["init"] == further.fuser.init
    assert second["validation_loss"] == pytest.approx(first["validation_loss"], abs=0.05)
    before, after = weights(tmp_path / "first"), weights(tmp_path / "second")
    for name in ("own_mean", "own_std", "other_mean", "other_std"):
        assert torch.equal(before[name], after[name]), f"{name} was measured anew"
    wider = recipe(fuser={"init": further.fuser.init, "sizes": sizes | {"width": 32}})
    with pytest.raises(RecipeError, match="another build"):
        train(wider, tmp_path / "wider", machine)


def test_a_run_that_goes_on_has_its_own_gates_unless_they_are_learned(models, recipe, machine, tmp_path):
    train(recipe(fuser={"gate": {"initial_logit": 0.5}}, optim={"max_steps": 8}), tmp_path / "first", machine)
    learned = weights(tmp_path / "first")["gate.logit"]

    def begun(**gate):
        (fuser,) = load_pair(recipe(fuser={"init": str(tmp_path / "first" / "fuser"), "gate": gate}), machine).fusers
        return fuser.gate.logit

    assert torch.equal(begun(learned=True), learned) and not torch.equal(learned, torch.full_like(learned, 0.5))
    values = begun(learned=False, initial_logit=1.0, kinds=["values"], layers=[1])
    assert values.tolist() == [[-1, -1], [-1, 1]]


@pytest.mark.parametrize("fuse_last", [4, None])
def test_rows_that_are_fused_everywhere_are_learned_alike_with_and_without_stored_prefills(
    models, recipe, machine, tmp_path, fuse_last
):
    write_chats(machine.data_dir / "train.jsonl", [[(f"number {i}, which?", f"{i} and {i}, {i}")] for i in range(8)])
    write_chats(machine.data_dir / "dev.jsonl", [[(f"number {i}, which?", f"{i} and {i}, {i}")] for i in range(8, 10)])
    asked = recipe(objective={"fused": "everywhere"}, fuser={"fuse_last": fuse_last}, optim={"epochs": 8})
    stored = train(asked, tmp_path / "stored", machine)
    live = train(asked, tmp_path / "live", dataclasses.replace(machine, features=None))
    losses = [entry["eval_loss"] for entry in history(tmp_path / "stored") if "eval_loss" in entry]
    assert losses[-1] < losses[0]
    assert live["validation_loss"] == pytest.approx(stored["validation_loss"], abs=1e-3)


def test_a_model_that_takes_no_mask_for_each_token_is_not_fused_everywhere(
    models, recipe, machine, tmp_path, monkeypatch
):
    monkeypatch.setattr("cache2cache.models.trees.readable", lambda lm, longest: False)
    with pytest.raises(ModelError, match="cannot read rows that are fused everywhere"):
        train(recipe(objective={"fused": "everywhere"}), tmp_path / "out", machine)


def test_a_model_that_does_not_see_a_whole_row_is_not_fused_everywhere(models, recipe, machine, tmp_path, monkeypatch):
    monkeypatch.setattr("cache2cache.models.trees.sees_all", lambda lm, tokens: False)
    with pytest.raises(ModelError, match="does not see a whole row in every layer"):
        train(recipe(objective={"fused": "everywhere"}), tmp_path / "out", machine)
