"""Two runs side by side: differences over the same rows, settings that differ, folders that hold no run."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from scipy.stats import binomtest

from cache2cache.errors import DataError
from cache2cache.evaluate.report.compare import compare, comparison_markdown, print_comparison
from cache2cache.evaluate.schema import Estimate, Report, RowRecord, SystemSummary, TaskSummary


def summary(values, metric):
    mean = sum(values) / len(values)
    return SystemSummary(
        rows=len(values), errors=0, metrics={metric: Estimate(value=mean, low=mean, high=mean, n=len(values))}
    )


def task(systems, metric="likelihood", title="ARC-Easy"):
    return TaskSummary(
        title=title, kind="choice", licence="CC0", source="s", rows=1, dropped={}, primary=metric,
        lower_is_better=["nats"] if metric == "nats" else [], pairs=[], gap_recovered={}, transfer=[], subjects={},
        systems={name: summary(values, metric) for name, values in systems.items()},
    )  # fmt: skip


def make_run(folder, systems, *, name="arc_easy", metric="likelihood", settings=None, change=lambda row: None):
    """A run in which every system has these numbers on rows 0, 1, …"""
    folder.mkdir()
    run = {"receiver": "small", "sharers": ["big"], "seed": 0, "started": str(folder), "seconds": len(str(folder))}
    report = Report(run=run | (settings or {}), tasks={name: task(systems, metric)}, latency={})
    (folder / "report.json").write_text(report.model_dump_json())
    lines = []
    for system, values in systems.items():
        for i, value in enumerate(values):
            row = RowRecord(task=name, id=str(i), subject="s", system=system, target="A", metrics={metric: value})
            change(row)
            lines.append(row.model_dump_json() + "\n")
    (folder / "rows.jsonl").write_text("".join(lines))
    return folder


def only(comparison):
    (one,) = comparison.compared
    return one


A, B = [1, 1, 1, 0, 0, 0, 0, 0, 0, 1], [1, 0, 1, 1, 1, 1, 1, 1, 1, 1]


def test_the_difference_is_over_the_same_rows(tmp_path):
    one = only(compare(make_run(tmp_path / "a", {"c2c": A}), make_run(tmp_path / "b", {"c2c": B})))
    assert one.a is not None and one.b is not None and one.difference is not None
    assert (one.a.value, one.b.value) == (0.4, 0.9)
    assert (one.difference.value, one.difference.n) == (pytest.approx(0.5), 10)
    assert one.difference.low < 0.5 < one.difference.high
    assert (one.only_a, one.only_b) == (1, 6)
    assert one.p == pytest.approx(binomtest(1, 7).pvalue)


def test_rows_that_only_one_run_answered_are_left_out_of_the_difference(tmp_path):
    one = only(compare(make_run(tmp_path / "a", {"c2c": A}), make_run(tmp_path / "b", {"c2c": B[:5]})))
    assert one.a is not None and one.difference is not None
    assert (one.a.n, one.difference.n, one.difference.value) == (10, 5, pytest.approx(0.2))


def test_a_row_with_another_right_answer_is_another_row(tmp_path):
    def change(row):
        if row.id in ("0", "1"):
            row.target = "B"

    one = only(compare(make_run(tmp_path / "a", {"c2c": A}), make_run(tmp_path / "b", {"c2c": B}, change=change)))
    assert one.difference is not None
    assert (one.difference.n, one.only_a) == (8, 0)


def test_a_row_that_asks_something_else_is_another_row_and_told(tmp_path):
    def change(row):
        row.asked = "other" if row.id in ("0", "1", "2") else ""

    found = compare(make_run(tmp_path / "a", {"c2c": A}), make_run(tmp_path / "b", {"c2c": B}, change=change))
    assert only(found).difference is not None and only(found).difference.n == 7
    note = "arc_easy: 3 rows of the same id ask something else in b, and are in no difference"
    console = Console(file=io.StringIO(), width=120)
    print_comparison(found, console)
    assert note in console.file.getvalue()  # type: ignore[attr-defined]
    assert note.replace("_", r"\_") in comparison_markdown(found)


def fail_first(row):
    if row.id == "0":
        row.metrics, row.error = {}, "ValueError: no"


def test_an_error_is_wrong(tmp_path):
    one = only(compare(make_run(tmp_path / "a", {"c2c": A}, change=fail_first), make_run(tmp_path / "b", {"c2c": B})))
    assert one.difference is not None
    assert (one.difference.n, one.only_b) == (10, 7)


def test_nats_have_no_p_and_errors_have_no_nats(tmp_path):
    a = make_run(tmp_path / "a", {"c2c": [2.0, 2.5, 3.0]}, metric="nats", change=fail_first)
    b = make_run(tmp_path / "b", {"c2c": [9.0, 2.0, 2.25]}, metric="nats")
    one = only(compare(a, b))
    assert one.difference is not None
    assert (one.difference.value, one.difference.n) == (-0.625, 2)
    assert one.p is one.only_a is one.only_b is None
    assert "−0.625" in comparison_markdown(compare(a, b))


def test_systems_and_tasks_of_one_run_only_are_shown_without_a_difference(tmp_path):
    a = make_run(tmp_path / "a", {"c2c": A, "receiver": B})
    b = make_run(tmp_path / "b", {"c2c": B}, name="mmlu")
    found = {(one.a is None, one.b is None, one.system): one.difference for one in compare(a, b).compared}
    assert found == {(False, True, "receiver"): None, (False, True, "c2c"): None, (True, False, "c2c"): None}


def test_settings_that_differ_are_listed_and_outcomes_are_not(tmp_path):
    a = make_run(tmp_path / "a", {"c2c": A}, settings={"forms": {"sharer": "quiz", "receiver": "chat"}, "limit": 10})
    b = make_run(tmp_path / "b", {"c2c": B}, settings={"forms": {"sharer": "chat", "receiver": "chat"}, "seed": 1})
    assert compare(a, b).settings == (
        ("seed", "0", "1"),
        ("forms.sharer", "quiz", "chat"),
        ("limit", "10", "–"),
    )
    assert compare(a, a).settings == ()


def test_markdown_holds_the_numbers(tmp_path):
    text = comparison_markdown(
        compare(make_run(tmp_path / "a", {"c2c": A}), make_run(tmp_path / "b", {"c2c": B}, settings={"seed": "<b>|"}))
    )
    (line,) = [line for line in text.splitlines() if line.startswith("| c2c ")]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[:3] == ["c2c", "40.0 (40.0–40.0)", "90.0 (90.0–90.0)"]
    assert cells[3].startswith("+50.0 (")
    assert cells[4:] == ["0.125", "1", "6", "10"]
    assert "## ARC-Easy: likelihood, %" in text
    assert "| seed | 0 | &lt;b&gt;\\| |" in text


def test_the_terminal_shows_the_same_within_120_columns(tmp_path):
    comparison = compare(
        make_run(tmp_path / "a", {"without-sharer": A}),
        make_run(tmp_path / "b", {"without-sharer": B}, settings={"seed": 1}),
    )
    console = Console(width=120, file=io.StringIO(), record=True)
    print_comparison(comparison, console)
    lines = console.export_text().splitlines()
    assert max(map(len, lines)) <= 120
    (row,) = [line.split() for line in lines if line.startswith("without-sharer")]
    assert row[:5] == ["without-sharer", "40.0", "(40.0–40.0)", "90.0", "(90.0–90.0)"]
    assert row[-4:] == ["0.125", "1", "6", "10"]
    assert ["seed", "0", "1"] in [line.split() for line in lines]


@pytest.mark.parametrize("name", ["report.json", "rows.jsonl"])
@pytest.mark.parametrize("which", [0, 1])
def test_a_folder_without_a_finished_run_is_named(name, which, tmp_path):
    runs = [make_run(tmp_path / run, {"c2c": A}) for run in "ab"]
    (runs[which] / name).unlink()
    with pytest.raises(DataError, match=f"holds no {name}; got {runs[which]}"):
        compare(*runs)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(DataError, match="holds no report.json"):
        compare(tmp_path / "absent", make_run(tmp_path / "b", {"c2c": B}))


@pytest.mark.parametrize(
    ("name", "spoil", "words"),
    [
        ("report.json", lambda text: text[:-20], "report.json is no report"),
        ("report.json", lambda text: text.replace('"tasks"', '"jobs"'), "tasks: Field required"),
        ("rows.jsonl", lambda text: "{}\n" + text, "line 1 is no RowRecord"),
        ("rows.jsonl", lambda text: text + text.splitlines()[0] + "\n", "answered a row twice; got arc_easy, 0, c2c"),
    ],
)
def test_damaged_files_are_refused(name, spoil, words, tmp_path):
    run = make_run(tmp_path / "a", {"c2c": A})
    (run / name).write_text(spoil((run / name).read_text()))
    with pytest.raises(DataError, match=words):
        compare(run, run)
