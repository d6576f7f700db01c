"""What a report says of planted rows: denominators, pairs, gaps, transfer, subjects, latency."""

import json
import random

import numpy as np
import pytest

from cache2cache.errors import DataError
from cache2cache.evaluate import stats
from cache2cache.evaluate.schema import LatencyRecord, Report, RowRecord
from cache2cache.evaluate.summary import TaskInfo, summarise

CHOICE = TaskInfo("ARC-Easy", "choice", "CC", "arc@1", {"wrong key": 3}, ("likelihood", "generate"), "likelihood")
TEXT = TaskInfo("SQuAD", "generation", "CC", "squad@1", {}, ("f1", "em", "nats"), "f1")
CHATS = TaskInfo("Chats", "likelihood", "CC", "dolly@1", {}, ("nats",), "nats")
SHARE = (0.0, 1.0)


def row(system, number, task="arc", subject="science", **fields):
    return RowRecord(task=task, id=f"r{number}", subject=subject, system=system, target="A", **fields)


def letters(likeliest, confidence=0.7):
    others = (1 - confidence) / 3
    return np.log([confidence if letter == likeliest else others for letter in "ABCD"]).tolist()


def choice(system, rights, **fields):
    """One answered row per outcome; where it is wrong the system prefers and names B."""
    return [
        row(
            system, number, extracted="A" if right else "B", letter_logprobs=letters("A" if right else "B"),
            metrics={"likelihood": float(right), "generate": float(right)}, **fields,
        )
        for number, right in enumerate(rights)
    ]  # fmt: skip


def measured(system, values, metric="nats", task="chats", **fields):
    return [row(system, i, task, metrics={metric: float(value)}, **fields) for i, value in enumerate(values)]


def failed(system, numbers, task="arc"):
    return [row(system, number, task, error="RuntimeError: out of luck") for number in numbers]


def report_of(rows, info=CHOICE, latency=()):
    (task,) = {one.task for one in rows}
    return summarise(rows, latency, {task: info}, {"seed": 0}).tasks[task]


def rights(share, rows=200, seed=0):
    return np.random.default_rng(seed).random(rows) < share


# one system


def test_a_task_is_described_by_its_info():
    task = report_of(choice("receiver", [1, 0]) + choice("c2c", [1, 0, 1]))
    assert (task.title, task.kind, task.licence, task.source) == ("ARC-Easy", "choice", "CC", "arc@1")
    assert (task.rows, task.dropped, task.primary, task.lower_is_better) == (3, {"wrong key": 3}, "likelihood", [])
    assert report_of(measured("receiver", [1.0]), CHATS).lower_is_better == ["nats"]


def test_accuracies_have_wilsons_interval_and_other_shares_that_of_the_mean():
    task = report_of(choice("receiver", [1, 1, 0, 1]))
    assert task.systems["receiver"].metrics == dict.fromkeys(("likelihood", "generate"), stats.wilson([1, 1, 0, 1]))
    f1 = [0.0, 0.5, 1.0, 0.8, 0.3, 0.7]
    rows = [
        row("receiver", i, "squad", metrics={"f1": x, "em": float(x == 1), "nats": 2 + x}) for i, x in enumerate(f1)
    ]
    metrics = report_of(rows, TEXT).systems["receiver"].metrics
    assert metrics["f1"] == stats.mean(f1, SHARE)
    assert metrics["em"] == stats.wilson([0, 0, 1, 0, 0, 0])
    assert metrics["nats"] == stats.mean([2 + x for x in f1])


def test_errors_count_as_wrong_and_as_rows():
    system = report_of(choice("c2c", [1] * 6 + [0] * 2) + failed("c2c", [8, 9])).systems["c2c"]
    assert (system.rows, system.errors) == (10, 2)
    assert system.metrics["generate"] == stats.wilson([1] * 6 + [0] * 4)


def test_errors_count_as_zero_in_shares_and_are_left_out_where_less_is_better():
    answered = [row("c2c", i, "squad", metrics={"f1": 0.8, "em": 0.0, "nats": 1.5 + i}) for i in range(6)]
    system = report_of(answered + failed("c2c", [6, 7], "squad"), TEXT).systems["c2c"]
    assert (system.rows, system.errors) == (8, 2)
    assert system.metrics["f1"].value == pytest.approx(0.6) and system.metrics["f1"].n == 8
    assert system.metrics["em"].n == 8
    assert system.metrics["nats"].value == pytest.approx(4.0) and system.metrics["nats"].n == 6


def test_a_system_that_only_fails_is_wrong_everywhere():
    rows = choice("receiver", [1, 0, 1]) + failed("broken", range(3))
    broken = report_of(rows).systems["broken"]
    assert (broken.rows, broken.errors) == (3, 3)
    assert {name: found.value for name, found in broken.metrics.items()} == {"likelihood": 0.0, "generate": 0.0}
    assert (broken.format_failures, broken.cut_off, broken.calibration_error, broken.tokens) == (None, None, None, {})


def test_a_system_that_only_fails_has_no_nats():
    task = report_of(measured("receiver", [1, 2]) + failed("broken", range(2), "chats"), CHATS)
    assert (task.systems["broken"].metrics, task.systems["broken"].errors) == ({}, 2)
    assert task.pairs == []


def test_format_failures_and_cut_off_answers_are_shares_of_the_answers():
    rows = choice("c2c", [1] * 8) + failed("c2c", [8, 9])
    for number in (0, 1):
        rows[number].extracted, rows[number].metrics["generate"] = None, 0.0
    for number in (1, 2, 3):
        rows[number].ended = False
    system = report_of(rows).systems["c2c"]
    assert system.format_failures == stats.wilson([1] * 2 + [0] * 6)
    assert system.cut_off == stats.wilson([1] * 3 + [0] * 5)


def test_rows_that_are_not_asked_for_text_have_no_format():
    system = report_of(measured("c2c", [1.0, 2.0]), CHATS).systems["c2c"]
    assert (system.format_failures, system.cut_off, system.calibration_error) == (None, None, None)
    assert system.agreement_with_sharer is None


@pytest.mark.parametrize("metric", ["generate", "correct", "em"])
def test_every_task_with_text_has_a_format(metric):
    info = TaskInfo("T", "generation", "", "", {}, (metric,), metric)
    rows = [row("c2c", i, metrics={metric: 1.0}, extracted=x) for i, x in enumerate(["7", None])]
    found = report_of(rows, info).systems["c2c"].format_failures
    assert found is not None and found.value == 0.5


def test_calibration_leaves_errors_out():
    answered = choice("c2c", [1, 1, 0, 1])
    expected = stats.calibration_error([one.letter_logprobs for one in answered], [1, 1, 0, 1])
    system = report_of(answered + failed("c2c", [4])).systems["c2c"]
    assert system.calibration_error == pytest.approx(expected) == pytest.approx(abs(0.75 - 0.7))


def test_agreement_is_that_of_the_likeliest_letters_on_rows_that_both_answered():
    sharer = choice("sharer", [1, 0, 1, 0]) + failed("sharer", [4])
    c2c = [
        row("c2c", number, letter_logprobs=letters(letter), extracted="A", metrics={"likelihood": 0.0, "generate": 1.0})
        for number, letter in enumerate("ABCDAA")
    ]
    systems = report_of(sharer + c2c + failed("t2t", [0])).systems
    assert systems["c2c"].agreement_with_sharer == stats.wilson([1, 1, 0, 0])
    assert systems["sharer"].agreement_with_sharer is None
    assert systems["t2t"].agreement_with_sharer is None


def test_without_common_rows_or_a_sharer_there_is_no_agreement():
    assert report_of(choice("c2c", [1, 0])).systems["c2c"].agreement_with_sharer is None
    apart = choice("sharer", [1]) + choice("c2c", [1, 0])[1:]
    assert report_of(apart).systems["c2c"].agreement_with_sharer is None


def test_costs_and_routes_are_means_over_the_answers():
    rows = choice("routing", [1, 0, 1, 1], receiver_read=10, sharer_wrote=3, text_bytes=40)
    for one, route, size in zip(rows, ["sharer", "receiver", "sharer", "sharer"], [0, 100, 200, 300], strict=True):
        one.route, one.cache_bytes = route, size
    systems = report_of(rows + failed("routing", [4]) + choice("receiver", [1])).systems
    found = systems["routing"]
    assert found.routed_to_sharer == 0.75
    assert found.tokens == {"receiver_read": 10, "sharer_read": 0, "receiver_wrote": 0, "sharer_wrote": 3}
    assert (found.cache_bytes, found.text_bytes) == (150, 40)
    assert systems["receiver"].routed_to_sharer is None


# pairs


def names_of(task):
    return {(pair.a, pair.b) for pair in task.pairs}


def test_who_is_compared_with_whom():
    systems = ("receiver", "sharer", "sharer-2", "t2t", "c2c", "c2c-1", "mismatched")
    task = report_of([one for system in systems for one in choice(system, [1, 0])])
    against_baselines = {(a, b) for a in systems[1:] for b in ("receiver", "sharer") if a != b}
    assert names_of(task) == against_baselines | {("c2c", b) for b in systems if b != "c2c"}
    assert len(task.pairs) == 2 * len(names_of(task)), "once in each of both metrics"


def test_pairs_compare_the_rows_that_both_were_asked():
    c2c, t2t = rights(0.6), rights(0.4, 80, seed=1)
    task = report_of(choice("c2c", c2c) + choice("t2t", t2t))
    pair = next(pair for pair in task.pairs if pair.metric == "generate")
    assert (pair.a, pair.b) == ("c2c", "t2t")
    assert pair.difference == stats.paired(c2c[:80], t2t, SHARE)
    assert (pair.p, pair.only_a, pair.only_b) == stats.mcnemar(c2c[:80], t2t)


def test_rows_are_paired_by_id_and_not_by_their_order():
    receiver, c2c = choice("receiver", [1] * 10 + [0] * 10), choice("c2c", [1] * 10 + [0] * 10)
    pair = report_of(receiver + c2c[::-1]).pairs[0]
    assert (pair.only_a, pair.only_b, pair.p, pair.difference.value) == (0, 0, 1.0, 0.0)


def test_an_error_is_a_loss_in_a_pair():
    task = report_of(choice("receiver", [1, 1, 0, 0]) + choice("c2c", [1, 1, 1]) + failed("c2c", [3]))
    assert [(pair.only_a, pair.only_b, pair.difference.n) for pair in task.pairs] == [(1, 0, 4)] * 2
    task = report_of(choice("receiver", [1, 1]) + failed("c2c", [0, 1]))
    assert [pair.difference.value for pair in task.pairs] == [-1.0, -1.0]


def test_numbers_that_are_not_binary_have_no_p_and_errors_no_nats():
    rows = measured("receiver", [2, 3, 4, 5, 6, 7]) + measured("c2c", [1, 2, 3, 4, 6]) + failed("c2c", [5], "chats")
    (pair,) = report_of(rows, CHATS).pairs
    assert (pair.p, pair.only_a, pair.only_b) == (None, None, None)
    assert pair.difference == stats.paired([1, 2, 3, 4, 6], [2, 3, 4, 5, 6])


def test_systems_without_a_common_row_are_not_compared():
    assert report_of(choice("receiver", [1]) + choice("c2c", [1, 0])[1:]).pairs == []


def test_a_metric_that_only_one_has_is_not_compared():
    without = choice("t2t", [1, 0, 1])
    for one in without:
        del one.metrics["likelihood"]
    task = report_of(choice("receiver", [1, 0, 0]) + without)
    assert [pair.metric for pair in task.pairs] == ["generate"]
    assert list(task.systems["t2t"].metrics) == ["generate"]
    assert task.systems["t2t"].calibration_error is None


# the gap


def test_gap_recovered_is_on_the_rows_that_all_three_answered():
    receiver, sharer, t2t = rights(0.3), rights(0.8, seed=1), rights(0.5, 90, seed=2)
    rows = choice("receiver", receiver) + choice("sharer", sharer) + choice("t2t", t2t)
    assert report_of(rows).gap_recovered == {"t2t": stats.gap_recovered(t2t, receiver[:90], sharer[:90], SHARE)}


def test_no_gap_is_recovered_where_receiver_and_sharer_are_alike():
    same = rights(0.5)
    assert (
        report_of([*choice("receiver", same), *choice("sharer", same), *choice("c2c", rights(0.9))]).gap_recovered == {}
    )


def test_gap_recovered_where_less_is_better():
    receiver = 4 + np.random.default_rng(0).random(60)
    rows = measured("receiver", receiver) + measured("sharer", receiver - 2) + measured("c2c", receiver - 1)
    assert report_of(rows, CHATS).gap_recovered["c2c"].value == pytest.approx(0.5)


def test_gap_recovered_needs_both_baselines():
    assert report_of(choice("receiver", rights(0.2)) + choice("c2c", rights(0.9))).gap_recovered == {}


# transfer


def transfer_of(own, other, info=CHOICE, make=choice):
    return report_of(make("c2c", own) + make("mismatched", other), info).transfer


def test_transfer_that_is_shown():
    found = transfer_of([1] * 150 + [0] * 50, [1] * 60 + [0] * 140)
    assert [one.metric for one in found] == ["likelihood", "generate"]
    assert all(one.shown for one in found)
    low, high = found[0].difference.low, found[0].difference.high
    assert found[0].sentence == (
        "Example-specific transfer is shown on ARC-Easy (likeliest letter is right): C2C is right 45.0 points more often "
        f"with the row's own cache than with another row's ({100 * low:.1f} to {100 * high:.1f}, n = 200)."
    )


def test_transfer_that_is_not_shown():
    (found, _) = transfer_of([1, 0] * 50, [0, 1] * 49 + [1, 0])
    assert not found.shown
    assert found.difference.low <= 0 <= found.difference.high
    assert found.sentence.startswith(
        "Example-specific transfer is not shown on ARC-Easy (likeliest letter is right): the row's own cache is ahead of "
        "another row's by 0.0 points, and the interval includes zero (−"
    )
    assert found.sentence.endswith(", n = 100).")


def test_a_cache_that_harms_is_no_transfer():
    (found, _) = transfer_of([0] * 60 + [1] * 40, [1] * 100)
    assert not found.shown and found.difference.high < 0
    assert found.sentence.startswith(
        "Example-specific transfer is not shown on ARC-Easy (likeliest letter is right): C2C"
    )
    assert " is right 60.0 points less often with the row's own cache than with another row's (" in found.sentence
    assert "−" not in found.sentence


@pytest.mark.parametrize(
    ("change", "shown", "words"),
    [
        (-0.25, True, "is shown on Chats (nats per token of the reference): C2C scores 0.250 lower with"),
        (0.25, False, "is not shown on Chats (nats per token of the reference): C2C scores 0.250 higher with"),
        (0.0, False, "is ahead of another row's by 0.000, and the interval includes zero (0.000 to 0.000, n = 40)."),
        (-0.0001, True, "C2C scores 0.0001 lower with"),
    ],
)
def test_fewer_nats_with_the_own_cache_are_transfer(change, shown, words):
    other = 3 + np.random.default_rng(0).random(40)
    (found,) = transfer_of(other + change, other, CHATS, measured)
    assert found.difference.value == pytest.approx(-change, abs=1e-9), "more is better"
    assert found.shown == shown
    assert words in found.sentence


@pytest.mark.parametrize(
    ("own", "word"), [(0.8, "C2C scores 30.0 points higher"), (0.2, "C2C scores 30.0 points lower")]
)
def test_transfer_in_a_share_that_is_not_binary(own, word):
    info = TaskInfo("SQuAD", "generation", "", "", {}, ("f1",), "f1")
    (found,) = transfer_of([own] * 50, [0.5] * 50, info, lambda *args: measured(*args, metric="f1"))
    assert found.shown == (own > 0.5) and word in found.sentence


@pytest.mark.parametrize("rows", [1, 3])
def test_a_few_rows_show_no_transfer(rows):
    assert not any(found.shown for found in transfer_of([1] * rows, [0] * rows))
    assert not any(
        found.shown for found in transfer_of([1.0, 2.0, 3.0][:rows], [1.5, 2.9, 3.1][:rows], CHATS, measured)
    )


def test_without_the_control_nothing_is_said_of_transfer():
    assert report_of(choice("receiver", [1, 0]) + choice("c2c", [1, 1])).transfer == []
    assert report_of(choice("receiver", [1, 0]) + choice("mismatched", [1, 1])).transfer == []


# subjects


def test_subjects_are_told_apart_if_there_are_several():
    rows = choice("c2c", [1, 1, 0], subject="law") + choice("c2c", [1, 1, 1, 0, 0], subject="art")[3:]
    rows += failed("c2c", [9]) + choice("receiver", [0], subject="law")
    assert report_of(rows).subjects == {
        "art": {"c2c": stats.wilson([0, 0])},
        "law": {"c2c": stats.wilson([1, 1, 0]), "receiver": stats.wilson([0])},
        "science": {"c2c": stats.wilson([0])},
    }
    assert report_of(choice("c2c", [1, 0])).subjects == {}


# latency


def request(system, seconds, task="arc", number=0, **stages):
    return LatencyRecord(task=task, id=f"r{number}", system=system, seconds=seconds, stages=stages)


def test_latency_is_over_all_tasks_and_a_missing_stage_takes_no_time():
    records = [request("c2c", 1.0, decode=0.4, fuse=0.2), request("c2c", 3.0, "chats", decode=1.0), request("t2t", 9.0)]
    rows = choice("c2c", [1]) + measured("c2c", [2.0])
    found = summarise(rows, records, {"arc": CHOICE, "chats": CHATS}, {}).latency
    assert list(found) == ["c2c", "t2t"]
    c2c = found["c2c"]
    assert (c2c.n, c2c.mean, c2c.p50, c2c.p90, c2c.p99) == pytest.approx((2, 2.0, 2.0, 2.8, 2.98))
    assert c2c.stages == pytest.approx({"decode": 0.7, "fuse": 0.1})
    assert (found["t2t"].n, found["t2t"].p99, found["t2t"].stages) == (1, 9.0, {})


def test_without_latencies_there_is_none():
    assert summarise(choice("c2c", [1]), [], {"arc": CHOICE}, {}).latency == {}


# the whole


def run_of_everything():
    rows = [
        one
        for i, name in enumerate(("receiver", "sharer", "c2c", "mismatched"))
        for one in choice(name, rights(0.5, 60, i))
    ]
    for one in rows[::7]:
        one.subject = "history"
    rows += choice("t2t", rights(0.4, 20, 8)) + failed("t2t", range(20, 23))
    for i, name in enumerate(("receiver", "sharer", "c2c", "mismatched")):
        rows += measured(name, np.random.default_rng(i).gamma(2, size=40) + 2 * (name != "sharer"))
    latency = [request(name, 0.1 * (i + 1), number=i, decode=0.05 * i) for i in range(9) for name in ("c2c", "sharer")]
    return rows, latency, {"arc": CHOICE, "chats": CHATS}, {"seed": 3, "limit": None}


def test_the_order_of_rows_changes_nothing():
    rows, latency, tasks, run = run_of_everything()
    expected = summarise(rows, latency, tasks, run).model_dump_json()
    for seed in range(2):
        random.Random(seed).shuffle(rows)
        random.Random(seed).shuffle(latency)
        assert summarise(rows, latency, tasks, run).model_dump_json() == expected


def test_a_report_survives_its_file():
    report = summarise(*run_of_everything())
    text = report.model_dump_json()
    assert Report.model_validate_json(text) == report
    assert "NaN" not in text and "Infinity" not in text
    assert json.loads(text)["run"] == {"seed": 3, "limit": None}
    assert list(report.tasks) == ["arc", "chats"]


def test_rows_are_left_as_they_were():
    rows, latency, tasks, run = run_of_everything()
    before = [one.model_copy(deep=True) for one in rows]
    summarise(rows, latency, tasks, run)
    assert rows == before


@pytest.mark.parametrize(
    ("rows", "latency", "message"),
    [
        (choice("c2c", [1]) * 2, [], "an answer occurs twice; got arc, row r0, c2c"),
        (choice("c2c", [1]) + failed("c2c", [0]), [], "occurs twice"),
        (measured("c2c", [1.0]), [], "not part of the run; got chats; allowed: arc"),
        (choice("c2c", [1]), [request("c2c", 1.0, "chats")], "not part of the run; got chats"),
        ([], [], "a task has no rows; got arc"),
        ([row("c2c", 0, metrics={"likelihood": 1.0, "rouge": 0.3})], [], "metrics of another task; got rouge"),
        (
            [*choice("c2c", [1, 1]), row("c2c", 2, metrics={"likelihood": 1.0})],
            [],
            "row r2: c2c has no number in generate",
        ),
        ([row("c2c", 0, metrics={"generate": float("nan")})], [], "row r0: c2c has no number in generate"),
        ([row("c2c", 0, metrics={"generate": 0.5})], [], "neither right nor wrong; got 0.5"),
        ([row("c2c", 0, metrics={"likelihood": 1.0})], [], "no letter likelihoods"),
    ],
)
def test_rows_that_cannot_be_counted_are_refused(rows, latency, message):
    with pytest.raises(DataError, match=message):
        summarise(rows, latency, {"arc": CHOICE}, {})


@pytest.mark.parametrize(
    ("metrics", "primary", "message"),
    [
        (("likelihood", "bleu"), "likelihood", "unknown metrics; got bleu"),
        (("em",), "f1", "primary metric.*got f1; allowed: em"),
    ],
)
def test_a_task_whose_metrics_do_not_exist_is_refused(metrics, primary, message):
    with pytest.raises(DataError, match=message):
        TaskInfo("T", "choice", "", "", {}, metrics, primary)
