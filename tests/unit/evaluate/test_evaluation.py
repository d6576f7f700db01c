"""A whole evaluation on tiny models: every system and control, resumed, extended, refused."""

import io
import itertools
import json
import random
import shutil

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate import evaluation
from cache2cache.evaluate.calls import read_calls
from cache2cache.evaluate.evaluation import evaluate
from cache2cache.evaluate.forms import FORMS
from cache2cache.evaluate.settings import Machine, Settings
from cache2cache.evaluate.systems import Alone, Fused
from cache2cache.testing import random_fuser, tiny_pair, tiny_tokenizer
from cache2cache.text.chat import render

SYSTEMS = "receiver,sharer,t2t:3,t2t-fair:2,routing,c2c"


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """With several, the order of a sum may differ from one run to the next, and the last bits with it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two models and three fusers on disk."""
    folder = tmp_path_factory.mktemp("pair")
    receiver, sharer = tiny_pair()
    for name, lm in (("tiny-receiver", receiver), ("tiny-sharer", sharer)):
        lm.model.save_pretrained(folder / name)
        lm.tokenizer.save_pretrained(folder / name)
    random_fuser(receiver, sharer, fuse_last=8).save_pretrained(folder / "fuser")
    random_fuser(receiver, sharer, seed=1, fuse_last=8).save_pretrained(folder / "without-sharer")
    random_fuser(receiver, receiver, fuse_last=8).save_pretrained(folder / "self")
    return folder


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A data folder with one multiple-choice set, and files of a user's own."""
    folder = tmp_path_factory.mktemp("data")
    rng = random.Random(0)
    words = ["stars", "moons", "rivers", "trees", "birds", "stones", "clouds", "lamps"]
    (folder / "arc_easy").mkdir()
    for split, count in (("train", 24), ("test", 7)):
        rows = [
            {"id": f"{split}-{i}", "subject": f"s{i % 2}", "question": f"Which are the {' '.join(rng.sample(words, 3))}?",
             "choices": rng.sample(words, 4), "answer": i % 4}
            for i in range(count)
        ]  # fmt: skip
        (folder / "arc_easy" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    chats = [
        {"messages": [{"role": "user", "content": f"Tell me of {a} and {b}."}, {"role": "assistant", "content": b}]}
        for a, b in itertools.pairwise(words)
    ]
    (folder / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chats))
    return folder


def settings(pair, data, **changes) -> Settings:
    options = {
        "receiver": str(pair / "tiny-receiver"), "sharers": (str(pair / "tiny-sharer"),), "fusers": (str(pair / "fuser"),),
        "tasks": ("arc-easy",), "systems": SYSTEMS, "message_tokens": 4, "latency_rows": 1,
        "controls": f"mismatched,zeroed,random,self={pair / 'self'},without-sharer={pair / 'without-sharer'}",
        "receiver_form": "completion",
    }  # fmt: skip
    return Settings(**{**options, **changes})


def numbers(out) -> dict:
    """A report without what differs from one run to the next: seconds, memory, and when."""
    report = json.loads((out / "report.json").read_text())
    for name in ("seconds", "started", "peak_memory_bytes", "commands"):
        report["run"].pop(name, None)
    report.pop("latency")
    return report


def rows(out) -> dict:
    lines = [json.loads(line) for line in (out / "rows.jsonl").read_text().splitlines()]
    return {(row["task"], row["system"], row["id"]): {k: v for k, v in row.items() if k != "seconds"} for row in lines}


@pytest.fixture(scope="module")
def whole(pair, data, tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    evaluate(settings(pair, data), out, Machine(batch_size=3, data_dir=data), command="c2c eval")
    return out


def test_every_system_answers_its_rows_and_the_report_has_them(whole):
    report = numbers(whole)
    counts = {name: system["rows"] for name, system in report["tasks"]["arc_easy"]["systems"].items()}
    every = ("receiver", "sharer", "routing", "c2c", "mismatched", "zeroed", "random", "self", "without-sharer")
    assert counts == {**dict.fromkeys(every, 7), "t2t": 3, "t2t-fair": 2}
    assert all(system["errors"] == 0 for system in report["tasks"]["arc_easy"]["systems"].values())
    assert {"forms", "router", "versions", "definitions"} <= set(report["run"])
    assert report["run"]["forms"]["receiver"]["choice"] == {"form": "completion", "rows": 0, "scores": {}}
    chosen = report["run"]["forms"]["sharer"]["choice"]
    assert chosen["rows"] == 24
    assert chosen["scores"][chosen["form"]] == max(chosen["scores"].values())
    for name in ("report.md", "report.html"):
        assert "ARC-Easy" in (whole / name).read_text()
    latency = [json.loads(line) for line in (whole / "latency.jsonl").read_text().splitlines()]
    assert len(latency) == len(counts)


def test_an_interrupted_run_gives_the_same_report(pair, data, whole, tmp_path):
    lines = (whole / "rows.jsonl").read_bytes()
    rng = random.Random(0)
    for attempt in range(3):
        out = tmp_path / str(attempt)
        out.mkdir()
        for name in ("run.json", "decisions.json", "router-choice.safetensors"):
            (out / name).write_bytes((whole / name).read_bytes())
        (out / "rows.jsonl").write_bytes(lines[: rng.randrange(len(lines))])
        evaluate(settings(pair, data), out, Machine(batch_size=3, data_dir=data))
        assert rows(out) == rows(whole)
        assert numbers(out) == numbers(whole)


def test_systems_that_are_added_later_answer_as_if_they_had_been_there(pair, data, whole, tmp_path):
    for systems, controls in (("receiver,t2t:2", ""), ("t2t:3,c2c", "mismatched,zeroed"), (SYSTEMS, None)):
        changes = {"systems": systems} if controls is None else {"systems": systems, "controls": controls}
        evaluate(settings(pair, data, **changes), tmp_path / "run", Machine(batch_size=3, data_dir=data))
    added, expected = rows(tmp_path / "run"), rows(whole)
    assert added.keys() == expected.keys()
    for key, row in added.items():
        # A system with a limit was asked in smaller batches before it was raised, on which last bits depend.
        logprobs = expected[key]["letter_logprobs"]
        assert row == expected[key] | {"letter_logprobs": row["letter_logprobs"]}
        assert row["letter_logprobs"] == (
            logprobs and pytest.approx(logprobs, abs=1e-4 if key[1] == "t2t" else 0, rel=0)
        )


def test_a_system_that_was_interrupted_is_left_out_of_the_report_until_it_has_all_its_rows(
    pair, data, tmp_path, monkeypatch
):
    """Its rows so far are the longest ones, which is no sample."""
    machine, out, console = (
        Machine(batch_size=3, data_dir=data),
        tmp_path / "run",
        Console(file=io.StringIO(), width=200),
    )

    def asked(systems, command):
        chosen = settings(pair, data, systems=systems, controls="", sharer_form="chat")
        return evaluate(chosen, out, machine, command=command, console=console)

    answer, batches = Fused.answer, iter(range(9))

    def interrupted(self, items):
        if next(batches) == 1:
            raise KeyboardInterrupt
        return answer(self, items)

    monkeypatch.setattr(Fused, "answer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        asked("c2c", "first")
    assert 0 < (count := len(rows(out))) < 7
    monkeypatch.setattr(Fused, "answer", answer)
    report = asked("receiver,t2t:2", "second")
    assert set(report.tasks["arc_easy"].systems) == set(report.latency) == {"receiver", "t2t"}
    assert report.run["systems"] == ["receiver", "t2t:2"]
    assert f"c2c is left out of the report: it was interrupted after {count} answers" in console.file.getvalue()  # type: ignore[attr-defined]
    report = asked("c2c", "third")
    assert {name: x.rows for name, x in report.tasks["arc_easy"].systems.items()} == {"receiver": 7, "t2t": 2, "c2c": 7}
    assert (report.run["systems"], report.run["controls"]) == (["c2c", "receiver", "t2t:2"], [])
    assert report.run["commands"] == ["first", "second", "third"]
    assert report.run["seconds"] == pytest.approx(sum(call.seconds for call in read_calls(out)), abs=0.01)
    (out / "calls.json").write_text("[{}]")
    with pytest.raises(DataError, match="calls.json is damaged"):
        asked("c2c", "fourth")


def test_latency_that_cannot_be_had_does_not_cost_the_report(pair, data, tmp_path, monkeypatch):
    answer = Alone.answer

    def fails_alone(self, items):
        if len(items) == 1:
            raise ValueError("one is too few")
        return answer(self, items)

    monkeypatch.setattr(Alone, "answer", fails_alone)
    chosen = settings(pair, data, systems="receiver,c2c", controls="", sharer_form="chat", limit=6)
    with pytest.raises(EvaluationError, match="no latency; got receiver on arc_easy.*report.json"):
        evaluate(chosen, tmp_path / "run", Machine(batch_size=3, data_dir=data))
    report = json.loads((tmp_path / "run" / "report.json").read_text())
    assert set(report["tasks"]["arc_easy"]["systems"]) == {"receiver", "c2c"}
    assert set(report["latency"]) == {"c2c"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"limit": 1}, "a single row"),
        ({"receiver_form": "poem"}, "unknown prompt form"),
        ({"tasks": ("talks",), "systems": "routing", "controls": ""}, "routing needs training rows"),
        ({"tasks": ("arc-easy", "talks"), "systems": "routing", "controls": ""}, "routing needs training rows"),
    ],
)
def test_what_the_rows_cannot_give_is_told_before_a_model_is_loaded(
    pair, data, tmp_path, monkeypatch, changes, message
):
    monkeypatch.setattr(evaluation, "_pair", lambda *_: pytest.fail("a model was loaded"))
    changes = {**changes, "tasks": tuple(
        str(data / "talks.jsonl") if name == "talks" else name for name in changes.get("tasks", ("arc-easy",))
    )}  # fmt: skip
    with pytest.raises(DataError, match=message):
        evaluate(settings(pair, data, **{"receiver_form": None, **changes}), tmp_path / "run", Machine(data_dir=data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"seed": 1}, "seed was 0, is 1"), ({"limit": 4}, "rows was 7, is 4")],
)
def test_a_folder_of_another_run_is_refused(pair, data, whole, changes, message):
    with pytest.raises(DataError, match=message):
        evaluate(settings(pair, data, **changes), whole, Machine(batch_size=3, data_dir=data))


def test_prefills_kept_on_disk_change_nothing(pair, data, whole, tmp_path):
    for out in ("first", "second"):  # the second run reads all that the first one kept
        machine = Machine(batch_size=3, data_dir=data, prefills=tmp_path / "prefills")
        evaluate(settings(pair, data, latency_rows=0), tmp_path / out, machine)
        for key, row in rows(tmp_path / out).items():
            expected = rows(whole)[key]
            assert row["answer"] == expected["answer"]
            assert row["letter_logprobs"] == pytest.approx(expected["letter_logprobs"], abs=1e-4)


def test_chats_are_measured_by_the_likelihood_of_their_responses(pair, data, tmp_path):
    chosen = settings(
        pair, data, tasks=(str(data / "talks.jsonl"),), systems="receiver,sharer,c2c,t2t", controls="mismatched,random",
        sharer_form="completion",
    )  # fmt: skip
    report = evaluate(chosen, tmp_path / "run", Machine(batch_size=3, data_dir=data))
    task = report.tasks["talks"]
    assert task.primary == "nats"
    assert set(task.systems) == {"receiver", "sharer", "c2c", "t2t", "mismatched", "random"}
    assert all(0 < system.metrics["nats"].value < 20 for system in task.systems.values())


def test_a_task_without_training_rows_asks_in_the_default_form_and_cannot_be_routed(pair, data, tmp_path):
    chosen = settings(
        pair, data, tasks=(str(data / "talks.jsonl"),), systems="receiver", controls="", receiver_form=None
    )
    report = evaluate(chosen, tmp_path / "run", Machine(batch_size=3, data_dir=data))
    assert report.run["forms"]["receiver"]["text"] == {"form": "chat", "rows": 0, "scores": {}}
    routed = settings(pair, data, tasks=(str(data / "talks.jsonl"),), systems="routing", controls="")
    with pytest.raises(DataError, match="training rows"):
        evaluate(routed, tmp_path / "routed", Machine(batch_size=3, data_dir=data))


@pytest.mark.parametrize(
    ("asked", "expected"), [(("arc-easy",), None), (("arc-easy:3",), 3), (("mmlu_redux:1000",), 1000)]
)
def test_a_task_may_have_a_limit_of_its_own(pair, data, asked, expected):
    ((_, limit),) = evaluation._tasks(settings(pair, data, tasks=asked)).values()
    assert limit == expected


def test_a_task_is_asked_once(pair, data):
    with pytest.raises(DataError, match="twice"):
        evaluation._tasks(settings(pair, data, tasks=("arc-easy", "arc_easy:3")))


@pytest.mark.parametrize("form", ["poem", "plain"])
def test_an_unknown_form_is_refused(pair, data, tmp_path, form):
    with pytest.raises(DataError, match="prompt form"):
        evaluate(settings(pair, data, receiver_form=form), tmp_path / "run", Machine(batch_size=3, data_dir=data))


@pytest.mark.parametrize("form", ["quiz", "chat-paper"])
@pytest.mark.parametrize("role", ["receiver", "sharer"])
def test_a_form_that_a_task_cannot_be_asked_in_is_told_before_a_row_is_asked(pair, data, tmp_path, form, role):
    chosen = settings(pair, data, tasks=("arc-easy", str(data / "talks.jsonl")), **{f"{role}_form": form})
    with pytest.raises(
        DataError, match=f"talks cannot be asked in the {role}'s form; got {form}; allowed: chat, completion"
    ):
        evaluate(chosen, tmp_path / "run", Machine(batch_size=3, data_dir=data))
    assert not (tmp_path / "run" / "rows.jsonl").exists()


def test_a_sharer_elsewhere_is_refused_before_it_is_asked(pair, data, tmp_path):
    with pytest.raises(DataError, match="needs the sharer's weights"):
        evaluate(settings(pair, data, sharers=("http://127.0.0.1:9",)), tmp_path / "run", Machine(data_dir=data))


def test_a_run_that_failed_before_its_first_row_leaves_its_folder_free(pair, data, tmp_path, monkeypatch):
    """Also where forms were chosen already, for a model that is not asked now."""
    machine, out = Machine(data_dir=data), tmp_path / "out"

    def nothing_to_learn(*_, **__):
        raise DataError("nothing to learn")

    with monkeypatch.context() as patch, pytest.raises(DataError, match="nothing to learn"):
        patch.setattr(evaluation, "decide", nothing_to_learn)
        evaluate(settings(pair, data, systems="receiver", controls="", sharer_form="completion"), out, machine)
    (out / "decisions.json").write_text("{}")
    right = settings(pair, data, systems="receiver", controls="", sharer_form="chat")
    evaluate(right, out, machine)
    assert json.loads((out / "run.json").read_text())["sharer_form"] == "chat"
    with pytest.raises(DataError, match="other settings"):
        evaluate(right.model_copy(update={"sharer_form": "completion"}), out, machine)


def test_prefills_that_cannot_be_kept_are_told_before_a_row_is_asked(pair, data, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written to"):
        evaluate(
            settings(pair, data), tmp_path / "out", Machine(data_dir=data, prefills=tmp_path / "file" / "prefills")
        )
    assert not (tmp_path / "out").exists()


def test_weights_that_were_trained_again_and_rows_that_were_edited_are_noticed(pair, data, tmp_path):
    """Under the same names, they would otherwise be mixed with what was answered before."""
    fuser, model, questions = tmp_path / "fuser", tmp_path / "model", tmp_path / "mine.jsonl"
    shutil.copytree(pair / "fuser", fuser)
    shutil.copytree(pair / "tiny-receiver", model)
    shutil.copy(data / "talks.jsonl", questions)
    chosen = settings(
        pair, data, receiver=str(model), fusers=(str(fuser),), tasks=(str(questions),), systems="receiver", controls="",
        sharer_form="completion", latency_rows=0,
    )  # fmt: skip
    evaluate(chosen, tmp_path / "run", Machine(batch_size=3))
    original = questions.read_text()
    questions.write_text(original.replace("Tell me of", "Speak of"))
    with pytest.raises(DataError, match=r"tasks\.mine\.digest was"):
        evaluate(chosen, tmp_path / "run", Machine(batch_size=3))
    questions.write_text(original)
    weights = load_file(model / "model.safetensors")
    trained = {name: weight + 0.01 for name, weight in weights.items()}
    save_file(trained, model / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(DataError, match="models was"):
        evaluate(chosen, tmp_path / "run", Machine(batch_size=3))
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    receiver, sharer = tiny_pair()
    shutil.rmtree(fuser)
    random_fuser(receiver, sharer, seed=7, fuse_last=8).save_pretrained(fuser)
    with pytest.raises(DataError, match="weights was"):
        evaluate(chosen, tmp_path / "run", Machine(batch_size=3))


def test_a_completion_shows_who_said_what():
    turns = [("user", "Who?"), ("assistant", "Me."), ("user", "Why?")]
    messages = [{"role": role, "content": content} for role, content in turns]
    text = render(tiny_tokenizer(), messages, template=FORMS["completion"].template).text
    assert text == "Who?\nAnswer: Me.\n\nWhy?\nAnswer:"
