"""The runner with planted systems: what they do is what the rows say, and a killed run loses and repeats nothing.

Run as a program, this file makes the runs that are killed: `test_runner.py FOLDER`.
"""

import importlib
import io
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from rich.console import Console

from cache2cache.errors import DataError, EvaluationError
from cache2cache.evaluate import folder
from cache2cache.evaluate.items import Answer, Cost, Item
from cache2cache.evaluate.latency import measure_latency
from cache2cache.evaluate.plan import Plan, make_plan
from cache2cache.evaluate.rowfile import read_records
from cache2cache.evaluate.runner import run
from cache2cache.evaluate.schema import LatencyRecord, RowRecord
from cache2cache.types import Timings

LETTERS = "ABCD"
SETTINGS = {"seed": 0, "systems": {"right": {"limit": None}}, "fuser": {"path": "demo", "sha256": "1"}}


# Stand-ins for tasks and systems


@dataclass
class Scored:
    extracted: str | None
    metrics: dict[str, float]


@dataclass
class Choice:
    """A multiple-choice task that reads a letter alone."""

    name: str

    def score(self, item: Item, answer: Answer) -> Scored:
        letter = answer.text if answer.text in tuple(item.letters) else None
        return Scored(letter, {"generate": float(letter == item.target)})


@dataclass
class Right:
    """Answers right, and says who was in the batch: what a row's numbers depend on."""

    name: str = "right"
    asked: list[tuple[str, ...]] = field(default_factory=list)

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        self.asked.append(tuple(item.id for item in items))
        return [self.one(item, items) for item in items]

    def one(self, item: Item, items: Sequence[Item]) -> Answer:
        cost = Cost(receiver_read=sum(int(other.id) for other in items))
        return Answer(item.target, letter_logprobs=(-1.0,), cost=cost, seconds=time.perf_counter())


class Guesses(Right):
    def one(self, item: Item, items: Sequence[Item]) -> Answer:
        return Answer(random.Random(item.id).choice(LETTERS))


class NeverEnds(Right):
    def one(self, item: Item, items: Sequence[Item]) -> Answer:
        return Answer("and so on " * 6, ended=False, cost=Cost(receiver_wrote=64))


class Raises(Right):
    """Fails on two rows of a hundred."""

    def one(self, item: Item, items: Sequence[Item]) -> Answer:
        if int(item.id) % 50 == 7:
            raise ValueError(f"row {item.id} is odd")
        return super().one(item, items)


@dataclass
class Crowded(Right):
    """Has room for few rows."""

    room: int = 3
    error: Exception = field(default_factory=MemoryError)

    def answer(self, items: Sequence[Item]) -> list[Answer]:
        answers = super().answer(items)
        if len(items) > self.room:
            raise self.error
        return answers


class Forgets(Right):
    def answer(self, items: Sequence[Item]) -> list[Answer]:
        return super().answer(items)[:-1]


def sample(count: int, task: str = "arc") -> list[Item]:
    return [
        Item(task, str(i), f"subject {i % 3}", {"plain": []}, topic=f"question {i}", target=LETTERS[i % 4], letters=LETTERS)
        for i in range(count)
    ]  # fmt: skip


def planned(*names: str, count: int = 12, batch_size: int = 4, tasks: Sequence[str] = ("arc",), **options) -> Plan:
    """All rows are equally long."""
    return make_plan({t: sample(count, t) for t in tasks}, names, lambda item: 10, batch_size=batch_size, **options)


def go(plan: Plan, systems: Sequence[Right], out: Path, **options) -> list[RowRecord]:
    options = {"settings": SETTINGS, "console": Console(file=io.StringIO())} | options
    run(plan, systems, [Choice(task) for task in plan.items], out, **options)
    return rows_in(out)


def rows_in(out: Path) -> list[RowRecord]:
    return read_records(out / folder.ROWS, RowRecord)


def comparable(rows: Sequence[RowRecord]) -> list[str]:
    return sorted(row.model_dump_json(exclude={"seconds"}) for row in rows)


# What planted systems leave behind


def test_every_row_of_every_task_and_system_becomes_one_line(tmp_path):
    plan = planned("right", "guesses", tasks=["arc", "mmlu"])
    rows = go(plan, [Right(), Guesses("guesses")], tmp_path)
    assert [(row.task, row.system, row.id) for row in rows] == list(plan.keys())
    row = next(row for row in rows if (row.task, row.system, row.id) == ("mmlu", "right", "2"))
    batch = next(b for b in plan.batches if b.task == "mmlu" and "2" in [item.id for item in b.items])
    assert row.model_dump(exclude={"seconds"}) == RowRecord(
        task="mmlu", id="2", subject="subject 2", system="right", target="C", asked=sample(3, "mmlu")[2].asked, answer="C",
        extracted="C",
        metrics={"generate": 1.0}, letter_logprobs=[-1.0], receiver_read=sum(int(item.id) for item in batch.items),
    ).model_dump(exclude={"seconds"})  # fmt: skip
    assert all(row.seconds > 0 for row in rows if row.system == "right")


def test_seconds_are_those_of_the_batch_divided_by_its_rows(tmp_path):
    class Slow(Right):
        def one(self, item: Item, items: Sequence[Item]) -> Answer:
            return Answer("A", seconds=6.0)

    assert {row.seconds for row in go(planned("right", count=3), [Slow()], tmp_path)} == {2.0}


def test_a_system_that_guesses_is_near_chance_and_the_same_again(tmp_path):
    plan = planned("guesses", count=400, batch_size=50)
    rows = go(plan, [Guesses("guesses")], tmp_path / "a")
    assert 0.15 < sum(row.metrics["generate"] for row in rows) / 400 < 0.35
    assert comparable(rows) == comparable(go(plan, [Guesses("guesses")], tmp_path / "b"))


def test_a_system_that_never_ends_is_cut_off_and_unreadable(tmp_path):
    rows = go(planned("endless"), [NeverEnds("endless")], tmp_path)
    assert {(row.ended, row.extracted, row.metrics["generate"], row.receiver_wrote) for row in rows} == {
        (False, None, 0.0, 64)
    }


def test_errors_are_rows_and_cost_no_other_row(tmp_path):
    rows = go(planned("odd", count=100, batch_size=10), [Raises("odd")], tmp_path, max_errors=0.05)
    failed = {row.id: row for row in rows if row.error}
    assert len(rows) == 100
    assert {number: row.error for number, row in failed.items()} == {
        "7": "ValueError: row 7 is odd", "57": "ValueError: row 57 is odd",
    }  # fmt: skip
    assert all((row.answer, row.extracted, row.metrics) == ("", None, {}) for row in failed.values())
    assert all(row.answer == row.target for row in rows if not row.error)


def test_a_run_stops_at_the_error_that_is_too_many_and_keeps_its_rows(tmp_path):
    plan, odd = planned("odd", "right", count=100, batch_size=10), Raises("odd")
    with pytest.raises(EvaluationError) as caught:
        go(plan, [odd, Right()], tmp_path, max_errors=0.01)
    text = str(caught.value)
    for part in ("odd failed on 2 of 100 rows of arc, 2.0%", "ValueError: row 7", "ValueError: row 57", "at most 1.0%"):
        assert part in text
    rows = rows_in(tmp_path)
    assert {row.id for row in rows if row.error} == {"7", "57"}
    assert len(rows) < 200, "it stopped where it was"

    asked = len(odd.asked)
    with pytest.raises(EvaluationError, match="2 of 100"):
        go(plan, [odd, Right()], tmp_path, max_errors=0.01)
    assert len(odd.asked) == asked, "what failed is not asked again"
    assert len(go(plan, [odd, Right()], tmp_path, max_errors=0.02)) == 200


def test_rows_with_errors_are_asked_again_only_if_their_lines_are_deleted(tmp_path):
    plan = planned("odd", count=100, batch_size=10)
    go(plan, [Raises("odd")], tmp_path)
    mended = Right("odd")
    assert sum(bool(row.error) for row in go(plan, [mended], tmp_path)) == 2
    assert not mended.asked
    file = tmp_path / folder.ROWS
    file.write_text("".join(f"{line}\n" for line in file.read_text().splitlines() if "ValueError" not in line))
    assert not any(row.error for row in go(plan, [mended], tmp_path))
    assert [len(batch) for batch in mended.asked] == [10, 10]


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")])
def test_a_batch_that_is_too_large_is_halved_and_its_size_remembered(tmp_path, error):
    crowded = Crowded("crowded", room=3, error=error)
    rows = go(planned("crowded", count=16, batch_size=8), [crowded], tmp_path)
    assert [len(batch) for batch in crowded.asked] == [8, 4, 2, 2, 2, 2, 2, 2, 2, 2]
    assert len(rows) == 16 and not any(row.error for row in rows)


def test_a_row_that_alone_is_too_large_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="got MemoryError; allowed"):
        go(planned("crowded", count=2), [Crowded("crowded", room=0)], tmp_path)
    assert [row.error for row in rows_in(tmp_path)] == ["MemoryError"] * 2


def test_a_system_with_too_few_answers_stops_the_run_at_once(tmp_path):
    forgets = Forgets("forgets")
    with pytest.raises(EvaluationError, match="forgets did not .* row of arc; got 3 answers to 4 rows"):
        go(planned("right", "forgets"), [Right(), forgets], tmp_path, max_errors=1)
    assert len(forgets.asked) == 1
    assert [row.system for row in rows_in(tmp_path)] == ["right"] * 4


@pytest.mark.parametrize("number", [math.nan, -math.inf])
def test_numbers_that_are_not_finite_are_errors(tmp_path, number):
    class Broken(Right):
        def one(self, item: Item, items: Sequence[Item]) -> Answer:
            return Answer("A", letter_logprobs=(0.0, number if item.id == "3" else -1.0))

    rows = go(planned("broken", count=40), [Broken("broken")], tmp_path)
    assert [(row.id, row.error) for row in rows if row.error] == [
        ("3", f"FloatingPointError: letter_logprobs[1] is {number}")
    ]


@pytest.mark.parametrize("stop", [KeyboardInterrupt, SystemExit])
def test_interrupts_pass_and_the_run_goes_on_later(tmp_path, stop):
    class Interrupted(Right):
        def answer(self, items: Sequence[Item]) -> list[Answer]:
            if len(self.asked) == 2:
                raise stop
            return super().answer(items)

    plan = planned("right")
    with pytest.raises(stop):
        go(plan, [Interrupted()], tmp_path)
    assert len(rows_in(tmp_path)) == 8
    assert comparable(go(plan, [Right()], tmp_path)) == comparable(go(plan, [Right()], tmp_path / "whole"))


def test_a_mistake_in_a_task_is_no_error_of_the_system(tmp_path):
    class Mistaken(Choice):
        def score(self, item: Item, answer: Answer) -> Scored:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        run(planned("right"), [Right()], [Mistaken("arc")], tmp_path, settings=SETTINGS, max_errors=1)
    assert rows_in(tmp_path) == []


# Order, limits


def test_systems_are_asked_the_same_batch_one_after_the_other_and_told_before(tmp_path):
    log = []

    class Logs(Right):
        def answer(self, items: Sequence[Item]) -> list[Answer]:
            log.append((self.name, len(items)))
            return super().answer(items)

    plan = planned("b", "a", count=6)
    go(plan, [Logs("a"), Logs("b")], tmp_path, on_batch=lambda items: log.append(("new", len(items))))
    assert log == [("new", 4), ("b", 4), ("a", 4), ("new", 2), ("b", 2), ("a", 2)]
    log.clear()
    go(plan, [Logs("a"), Logs("b")], tmp_path, on_batch=lambda items: log.append(("new", len(items))))
    assert log == [], "nothing is left to do"


def test_limited_systems_answer_the_first_rows(tmp_path):
    plan = planned("right", "half", "few", limits={"half": 6, "few": 3})
    rows = go(plan, [Right(), Right("half"), Right("few")], tmp_path)
    answered = {name: {int(row.id) for row in rows if row.system == name} for name in plan.systems}
    assert answered == {"right": set(range(12)), "half": set(range(6)), "few": set(range(3))}


# Going on


def test_a_system_may_join_a_run_later(tmp_path):
    right, late = Right(), Right("late")
    go(planned("right"), [right], tmp_path)
    settings = SETTINGS | {"systems": {"late": {"limit": None}}}
    rows = go(planned("right", "late"), [right, late], tmp_path, settings=settings)
    assert (len(rows), len(right.asked), len(late.asked)) == (24, 3, 3)
    assert late.asked == right.asked, "in the same batches"
    assert set(json.loads((tmp_path / folder.SETTINGS).read_text())["systems"]) == {"right", "late"}


def test_a_run_cut_at_any_byte_goes_on_to_the_same_rows(tmp_path):
    plan = planned("right", "odd", count=8)
    systems = [Right(), Raises("odd")]
    expected = comparable(go(plan, systems, tmp_path, max_errors=1))
    file = tmp_path / folder.ROWS
    whole = file.read_bytes()
    for size in range(0, len(whole), 41):
        file.write_bytes(whole[:size])
        kept = whole[:size].count(b"\n")
        rows = go(plan, systems, tmp_path, max_errors=1)
        assert comparable(rows) == expected
        assert file.read_bytes().startswith(b"".join(line + b"\n" for line in whole.split(b"\n")[:kept]))


def test_what_an_answer_holds_never_breaks_a_line(tmp_path):
    class Writes(Right):
        def one(self, item: Item, items: Sequence[Item]) -> Answer:
            return Answer("a\nb\r\n\u2028c\x85\x00🙂", message="\x1c\n")

    plan = planned("writes")
    go(plan, [Writes("writes")], tmp_path)
    assert {row.answer for row in go(plan, [Writes("writes")], tmp_path)} == {"a\nb\r\n\u2028c\x85\x00🙂"}
    assert len(rows_in(tmp_path)) == 12


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_a_run_killed_at_five_random_moments_equals_an_uninterrupted_one(tmp_path):
    # In a process of its own, which forks for each run: a process with threads, as pytest's may be, cannot safely fork.
    done = subprocess.run(
        [sys.executable, __file__, tmp_path], capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    moments, sizes = json.loads(done.stdout)
    expected = comparable(rows_in(tmp_path / "whole"))
    assert len(moments) == len(set(moments)) == 5
    assert 0 < sizes[0] < sizes[-1] < len(expected), "the kills came in the middle"
    assert comparable(rows_in(tmp_path / "killed")) == expected


KILLED_IN = ("runner.py", "asking.py", "rowfile.py", "folder.py")


def kill_five_times(out: Path) -> None:
    """An uninterrupted run, and one that is killed five times; prints the moments and the rows after each."""
    importlib.import_module("accelerate.utils.memory")  # here once, not in every fork
    total, _ = forked(out / "whole")
    rng, moments, sizes = random.Random(0), [], []
    for _ in range(5):
        moments.append(rng.randrange(total // 20, total // 6))  # none comes to its end
        _, status = forked(out / "killed", moments[-1])
        assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        sizes.append(len(rows_in(out / "killed")))
    _, status = forked(out / "killed")
    assert status == 0
    print(json.dumps([moments, sizes]))  # noqa: T201


def forked(out: Path, moment: int = -1) -> tuple[int, int]:
    """A run in a process that is killed at the given line of those files that it executes.

    Returns:
        How many lines it executed, if it came to its end, and its exit status.
    """
    reading, writing = os.pipe()
    if not (child := os.fork()):
        passed = 0

        def trace(frame, event, arg):
            nonlocal passed
            if os.path.basename(frame.f_code.co_filename) not in KILLED_IN:
                return None
            if event == "line":
                passed += 1
                if passed == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
            return trace

        plan = planned("right", "odd", "crowded", count=40, tasks=["arc", "mmlu"], limits={"odd": 20})
        sys.settrace(trace)
        go(plan, [Right(), Raises("odd"), Crowded("crowded")], out)
        sys.settrace(None)
        os.write(writing, str(passed).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        passed = int(pipe.read() or -1)
    return passed, os.waitpid(child, 0)[1]


# What is refused


@pytest.mark.parametrize(
    ("now", "words"),
    [
        ({"seed": 1}, r"seed was 0, is 1\. Give another --out, or delete"),
        ({"systems": {"right": {"limit": 3}}}, r"systems\.right\.limit was null, is 3"),
        ({"fuser": {"path": "demo", "sha256": "2"}}, r'fuser\.sha256 was "1", is "2"'),
        ({"fuser": None}, r'fuser was \{"path": "demo", "sha256": "1"\}, is null'),
        ({"limit": 3}, "limit was absent, is 3"),
        ({"seed": 2, "limit": 3}, "seed was 0, is 2; limit was absent, is 3"),
    ],
)
def test_a_folder_goes_on_only_with_its_own_settings(tmp_path, now, words):
    go(planned("right"), [Right()], tmp_path)
    with pytest.raises(DataError, match=words):
        go(planned("right"), [Right()], tmp_path, settings=SETTINGS | now)
    assert json.loads((tmp_path / folder.SETTINGS).read_text()) == SETTINGS


def test_settings_are_compared_as_json(tmp_path):
    go(planned("right"), [Right()], tmp_path, settings={"sharers": ("a", "b")})
    go(planned("right"), [Right()], tmp_path, settings={"sharers": ["a", "b"]})


def test_a_folder_that_cannot_be_trusted_is_refused(tmp_path):
    plan, systems = planned("right"), [Right()]
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="cannot be written"):
        go(plan, systems, tmp_path / "file")
    go(plan, systems, tmp_path / "held")
    with folder.held(tmp_path / "held", SETTINGS), pytest.raises(DataError, match="another process"):
        go(plan, systems, tmp_path / "held")
    (tmp_path / "held" / folder.SETTINGS).write_text("{")
    with pytest.raises(DataError, match="damaged"):
        go(plan, systems, tmp_path / "held")
    (tmp_path / "held" / folder.SETTINGS).unlink()
    with pytest.raises(DataError, match=r"holds rows\.jsonl but no run\.json"):
        go(plan, systems, tmp_path / "held")


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{}", "line 13 is no RowRecord; got task: Field required"),
        ("x", "line 13 is no RowRecord; got Invalid JSON"),
        (None, "more than once in .*got arc/right/0"),
    ],
)
def test_damaged_rows_are_refused(tmp_path, line, words):
    go(planned("right"), [Right()], tmp_path)
    file = tmp_path / folder.ROWS
    line = line or next(row.model_dump_json() for row in rows_in(tmp_path) if row.id == "0")
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(DataError, match=words):
        go(planned("right"), [Right()], tmp_path)


@pytest.mark.parametrize(
    ("systems", "tasks", "options", "words"),
    [
        (["right"], ["arc"], {"max_errors": 1.1}, "max_errors.*got 1.1; allowed: 0 to 1"),
        (["right"], ["arc"], {"max_errors": -0.1}, "max_errors"),
        (["wrong"], ["arc"], {}, "other systems.*got wrong; allowed: right"),
        (["right", "more"], ["arc"], {}, "other systems"),
        (["right"], ["mmlu"], {}, "other tasks.*got mmlu; allowed: arc"),
    ],
)
def test_bad_runs_are_refused(tmp_path, systems, tasks, options, words):
    with pytest.raises(DataError, match=words):
        run(planned("right"), [Right(n) for n in systems], [Choice(t) for t in tasks], tmp_path, settings={}, **options)


# Progress


def test_without_a_terminal_each_finished_system_is_one_line(tmp_path):
    out = io.StringIO()
    systems = [Right(), Raises("odd")]
    go(planned("right", "odd", tasks=["arc", "mmlu"]), systems, tmp_path, max_errors=1, console=Console(file=out))
    starts = [line.split(", ")[0] for line in out.getvalue().splitlines()]
    assert starts == ["arc · right: done", "arc · odd: done", "mmlu · right: done", "mmlu · odd: done"]
    assert out.getvalue().count(", 1 errors") == 2
    again = io.StringIO()
    go(planned("right", "odd", tasks=["arc", "mmlu"]), systems, tmp_path, max_errors=1, console=Console(file=again))
    assert again.getvalue() == ""


def test_on_a_terminal_there_is_a_bar_with_rate_and_remaining_time(tmp_path):
    out = io.StringIO()
    go(planned("right"), [Right()], tmp_path, console=Console(file=out, force_terminal=True, width=120))
    for part in ("arc · right", "12/12", "rows/s", "0:00:00"):
        assert part in out.getvalue()


# Latency


class Timed(Right):
    def one(self, item: Item, items: Sequence[Item]) -> Answer:
        return Answer("A", timings=Timings(sharer_prefill=0.25, decode=0.5), seconds=1.0)


def latency(plan: Plan, systems: Sequence[Right], out: Path, **options) -> list[LatencyRecord]:
    options = {"requests": 3, "settings": SETTINGS, "console": Console(file=io.StringIO())} | options
    assert measure_latency(plan, systems, out, **options) == []
    return read_records(out / folder.LATENCY, LatencyRecord)


def test_latency_is_of_single_requests_after_one_that_does_not_count(tmp_path):
    plan, one, two, told = planned("one", "two", tasks=["arc", "mmlu"]), Timed("one"), Timed("two"), []
    records = latency(plan, [one, two], tmp_path, on_batch=told.extend)
    ids = [("arc", "0"), ("arc", "1"), ("arc", "2"), ("mmlu", "0"), ("mmlu", "1"), ("mmlu", "2")]
    assert [(r.system, r.task, r.id) for r in records] == [(name, *key) for name in ("one", "two") for key in ids]
    assert {r.seconds for r in records} == {1.0}
    assert all(r.stages == {"sharer_prefill": 0.25, "decode": 0.5} for r in records)
    assert one.asked == two.asked == [("0",), *((row,) for _, row in ids)]
    assert len(told) == 14, "nothing of the request before may be reused"


def test_latency_goes_on_where_it_was_killed(tmp_path):
    plan, system = planned("one"), Timed("one")
    latency(plan, [system], tmp_path)
    file = tmp_path / folder.LATENCY
    file.write_bytes(file.read_bytes()[:-1])
    system.asked.clear()
    assert [r.id for r in latency(plan, [system], tmp_path)] == ["0", "1", "2"]
    assert system.asked == [("2",), ("2",)]
    with pytest.raises(DataError, match="other settings"):
        latency(plan, [system], tmp_path, settings={})


def test_a_request_that_fails_has_no_latency_and_is_reported(tmp_path):
    out = io.StringIO()
    records = latency(planned("odd"), [Raises("odd")], tmp_path, requests=9, console=Console(file=out, width=200))
    assert len(records) == 8
    assert "arc · odd: no latency of row 7: ValueError: row 7 is odd" in out.getvalue()


def test_a_system_that_answers_no_request_is_named(tmp_path):
    systems = [Crowded("crowded", room=0), Timed("one")]
    options = {"settings": SETTINGS, "console": Console(file=io.StringIO())}
    assert measure_latency(planned("crowded", "one"), systems, tmp_path, requests=1, **options) == ["crowded on arc"]
    assert [record.system for record in read_records(tmp_path / folder.LATENCY, LatencyRecord)] == ["one"]


def test_latency_that_nobody_can_measure_is_an_error(tmp_path):
    with pytest.raises(EvaluationError, match="got 0 answers to 1 rows"):
        latency(planned("forgets"), [Forgets("forgets")], tmp_path)
    with pytest.raises(DataError, match="latency needs requests; got 0"):
        latency(planned("one"), [Timed("one")], tmp_path, requests=0)


if __name__ == "__main__":
    kill_five_times(Path(sys.argv[1]))
