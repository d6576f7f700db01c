"""Broken systems, planted beside sound ones, are reported as what they are: from rows to the sentences of the report."""

import errno
import hashlib
import json

import pytest

from cache2cache.errors import EvaluationError
from cache2cache.evaluate import folder, report
from cache2cache.evaluate.items import Answer, Cost
from cache2cache.evaluate.plan import make_plan
from cache2cache.evaluate.rowfile import read_records
from cache2cache.evaluate.runner import run
from cache2cache.evaluate.schema import RowRecord
from cache2cache.evaluate.summary import TaskInfo, summarise
from cache2cache.evaluate.tasks import get, load

ROWS = 400


def digest(*parts) -> int:
    return int.from_bytes(hashlib.sha256("/".join(map(str, parts)).encode()).digest()[:4], "big")


def named(item, letter: str, **changes) -> Answer:
    likely = tuple(-0.1 if one == letter else -3.35 for one in item.letters)
    return Answer(letter, letter_logprobs=likely, cost=Cost(receiver_wrote=1), **changes)


class Knows:
    """Right on seven rows of ten."""

    def __init__(self, name, share=7):
        self.name, self.share = name, share

    def answer(self, items):
        return [named(item, item.target if digest(item.id) % 10 < self.share else self.wrong(item)) for item in items]

    def wrong(self, item):
        return next(letter for letter in item.letters if letter != item.target)


class Guesses:
    """Answers at random."""

    def __init__(self, name):
        self.name = name

    def answer(self, items):
        return [named(item, item.letters[digest(self.name, item.id) % 4]) for item in items]


class Raises(Knows):
    """Fails on one row of fifty."""

    def answer(self, items):
        if any(int(item.id) % 50 == 0 for item in items):
            raise RuntimeError("no luck with this row")
        return super().answer(items)


class NeverStops(Knows):
    """Writes until it is cut off, and names no letter."""

    def answer(self, items):
        endless = Answer("and so on " * 16, ended=False, letter_logprobs=(-1.386,) * 4, cost=Cost(receiver_wrote=64))
        return [endless] * len(items)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "quiz.jsonl"
    rows = [
        {"id": str(i), "question": f"Question {i}?", "choices": ["one", "two", "three", "four"], "answer": i % 4}
        for i in range(ROWS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return get(str(path))


def asked(task, out, *systems, max_errors=0.05):
    items = load(task).items
    plan = make_plan(
        {task.name: items}, [system.name for system in systems], lambda item: len(item.topic), batch_size=16
    )
    run(plan, systems, [task], out, settings={"systems": {}}, max_errors=max_errors)
    rows = read_records(out / folder.ROWS, RowRecord)
    info = TaskInfo(task.title, task.kind, task.licence, "quiz.jsonl", {}, task.metrics, task.primary)
    found = summarise(rows, [], {task.name: info}, {"receiver": "r", "sharers": ["s"]})
    report.write(found, rows, out, {(item.task, item.id): item.topic for item in items})
    return found.tasks[task.name]


def test_guessing_is_chance_and_its_transfer_is_not_shown(task, tmp_path):
    found = asked(task, tmp_path, Guesses("receiver"), Knows("sharer"), Guesses("c2c"), Guesses("mismatched"))
    for metric in ("likelihood", "generate"):
        accuracy = found.systems["c2c"].metrics[metric]
        assert accuracy.low < 0.25 < accuracy.high
    assert not any(transfer.shown for transfer in found.transfer)
    assert "not shown" in (tmp_path / "report.md").read_text()
    assert found.systems["c2c"].calibration_error > 0.5  # so sure, so often wrong


def test_knowledge_that_comes_with_the_right_cache_only_is_shown(task, tmp_path):
    found = asked(task, tmp_path, Guesses("receiver"), Knows("sharer"), Knows("c2c"), Guesses("mismatched"))
    assert all(transfer.shown for transfer in found.transfer)
    gap = found.gap_recovered["c2c"]
    assert gap.value == pytest.approx(1)
    assert found.systems["c2c"].agreement_with_sharer.value == 1


def test_a_system_that_raises_has_errors_and_they_count_as_wrong(task, tmp_path):
    found = asked(task, tmp_path, Knows("sharer", share=10), Raises("c2c", share=10))
    broken = found.systems["c2c"]
    assert (broken.rows, broken.errors) == (ROWS, ROWS // 50)
    for metric in ("likelihood", "generate"):
        assert broken.metrics[metric].value == pytest.approx(1 - 1 / 50)
        assert broken.metrics[metric].n == ROWS
    (pair,) = [p for p in found.pairs if (p.a, p.b, p.metric) == ("c2c", "sharer", "generate")]
    assert (pair.only_a, pair.only_b) == (0, ROWS // 50)
    rows = read_records(tmp_path / folder.ROWS, RowRecord)
    assert {row.error for row in rows if row.error} == {"RuntimeError: no luck with this row"}


def test_too_many_errors_end_the_run(task, tmp_path):
    with pytest.raises(EvaluationError, match="c2c failed on"):
        asked(task, tmp_path, Raises("c2c"), max_errors=0.01)


def test_a_system_that_never_stops_is_cut_off_and_names_nothing(task, tmp_path):
    found = asked(task, tmp_path, Knows("sharer"), NeverStops("c2c"))
    broken, sound = found.systems["c2c"], found.systems["sharer"]
    assert (broken.cut_off.value, broken.format_failures.value, broken.metrics["generate"].value) == (1, 1, 0)
    assert (sound.cut_off.value, sound.format_failures.value) == (0, 0)
    assert broken.tokens["receiver_wrote"] == 64


def test_a_full_disk_is_no_wrong_answer_but_ends_the_run(task, tmp_path):
    class FillsTheDisk(Knows):
        def answer(self, items):
            raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(EvaluationError, match="disk is full"):
        asked(task, tmp_path, FillsTheDisk("c2c"), max_errors=1)
    assert read_records(tmp_path / folder.ROWS, RowRecord) == []
