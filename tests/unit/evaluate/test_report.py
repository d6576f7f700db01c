"""The report of an evaluation: the same numbers in every file, hostile text escaped, the same bytes every time."""

from __future__ import annotations

import base64
import io
import itertools
import math
import random
import re
from html import unescape
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from cache2cache.errors import DataError, MissingExtraError
from cache2cache.evaluate.report import numbers, print_table, write
from cache2cache.evaluate.report.figures import costs, dots, heat, style, upset
from cache2cache.evaluate.report.order import ordered, ordered_stages
from cache2cache.evaluate.report.samples import MOST, sample
from cache2cache.evaluate.schema import (
    Estimate,
    LatencySummary,
    PairSummary,
    Report,
    RowRecord,
    SystemSummary,
    TaskSummary,
    Transfer,
)

SYSTEMS = {"receiver": 0.25, "sharer": 0.625, "t2t": 0.375, "c2c": 0.75, "mismatched": 0.125}
HOSTILE = '$\\frac$ <script>alert("1")</script> | [bold]x[/bold] `y` & "q" {{ 7 * 7 }}'
SUBJECTS = ("algebra", "botany", "chemistry", "drama")


def estimate(value, half=0.125, n=8):
    return Estimate(value=value, low=value - half, high=value + half, n=n)


def summary(value, **more):
    tokens = {"receiver_read": 120.0, "sharer_read": 140.5, "receiver_wrote": 2.0, "sharer_wrote": 0.0}
    return SystemSummary(rows=8, errors=0, metrics={"likelihood": estimate(value)}, tokens=tokens, **more)


def pair(a, b, value, **more):
    return PairSummary(a=a, b=b, metric="likelihood", difference=estimate(value), **more)


def choice_task(title="ARC-Easy", systems=SYSTEMS, **changes):
    found = {name: summary(value, calibration_error=0.0625) for name, value in systems.items()}
    for one in found.values():
        one.metrics["generate"] = estimate(0.5)
        one.format_failures = estimate(0.25)
    if "c2c" in found:
        found["c2c"].cache_bytes = 24_576.0
    fields = {
        "title": title,
        "kind": "choice",
        "licence": "CC BY-SA 4.0",
        "source": "org/set@abc",
        "rows": 8,
        "dropped": {"marked wrong": 3},
        "primary": "likelihood",
        "systems": found,
        "pairs": [
            pair("c2c", "receiver", 0.5, p=0.0004, only_a=5, only_b=1),
            pair("sharer", "c2c", -0.125, p=0.25, only_a=1, only_b=2),
        ],
        "gap_recovered": {"c2c": estimate(4 / 3)},
        "transfer": [
            Transfer(metric="likelihood", difference=estimate(0.6), shown=True, sentence="Transfer is shown.")
        ],
        "subjects": {subject: {name: estimate(value) for name, value in systems.items()} for subject in SUBJECTS},
    }
    return TaskSummary(**(fields | changes))


def nats_task():
    systems = {
        name: SystemSummary(rows=8, errors=0, metrics={"nats": estimate(2.5 - x)}) for name, x in SYSTEMS.items()
    }
    return TaskSummary(
        title="Chats", kind="likelihood", licence="CC0", source="local", rows=8, dropped={}, primary="nats",
        lower_is_better=["nats"], systems=systems, gap_recovered={}, subjects={},
        pairs=[PairSummary(a="c2c", b="receiver", metric="nats", difference=estimate(-0.5))],
        transfer=[Transfer(metric="nats", difference=estimate(0.1), shown=False, sentence="Transfer is not shown.")],
    )  # fmt: skip


def latency(**seconds):
    return {
        name: LatencySummary(n=4, mean=x, p50=x, p90=2 * x, p99=3 * x, stages={"decode": x / 2, "fuse": x / 4})
        for name, x in seconds.items()
    }


def make_report(tasks=None, **changes):
    run = {
        "receiver": "small", "sharers": ["big"], "fusers": ["demo"], "seed": 7,
        "commands": ["c2c eval --limit 8", "c2c eval --limit 8 --systems c2c"],
        "definitions": {name: f"what {name} is" for name in SYSTEMS}, "forms": {"receiver": {"choice": "chat"}},
        "router": {"share": 0.5}, "versions": {"torch": "2.13.0"}, "machine": {"threads": 2},
        "peak_memory_bytes": {"cpu": 4_340_000_000}, "seconds": 3723.0,
    }  # fmt: skip
    tasks = {"arc_easy": choice_task(), "chats": nats_task()} if tasks is None else tasks
    return Report(**({"run": run, "tasks": tasks, "latency": latency(receiver=0.5, c2c=1.25)} | changes))


def as_accurate(system, number):
    """Of eight rows, as many are right as the system's accuracy says."""
    return SYSTEMS.get(system, 0) * 8 > number


def make_rows(report: Report, right=as_accurate, count=8):
    rows = []
    for task, about in report.tasks.items():
        for number, system in itertools.product(range(count), about.systems):
            is_right = right(system, number)
            fields: dict[str, Any] = {
                "metrics": {"likelihood": float(is_right), "generate": 0.0},
                "letter_logprobs": [math.log(0.5)] * 2,
            }
            if about.kind == "likelihood":
                fields = {"metrics": {"nats": 1.5}}
            rows.append(RowRecord(task=task, id=f"r{number}", subject="s", system=system, target="A", **fields))
    return rows


def questions(rows):
    return {(row.task, row.id): f"Question {row.id} of {row.task}?" for row in rows}


def written(report, out, rows=None):
    rows = make_rows(report) if rows is None else rows
    write(report, rows, out, questions(rows))
    return out


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return written(make_report(), tmp_path_factory.mktemp("report"))


def markdown_tables(text):
    """Every table as a list of rows of cells, as GitHub shows them."""
    tables = []
    for block in text.split("\n\n"):
        lines = block.splitlines()
        if lines and lines[0].startswith("|"):
            cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if not line.startswith("| ---")]
            tables.append([[unescape(re.sub(r"\\(.)", r"\1", cell)).strip() for cell in row] for row in cells])
    return tables


class Page(HTMLParser):
    """What a browser would make of the page: tables, tags, attributes, text."""

    def __init__(self, text):
        super().__init__()
        self.tables, self.tags, self.attributes, self.text = [], [], [], []
        self.options: dict[str, dict[str, str]] = {}
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        found = {name: value or "" for name, value in attrs}
        self._inside = tag if tag in ("td", "th", "option") else self._inside
        self.tags.append(tag)
        self.attributes += attrs
        match tag:
            case "table":
                self.tables.append([])
            case "tr":
                self.tables[-1].append([])
            case "th" | "td":
                self.tables[-1][-1].append("")
            case "select":
                self.options[found["id"]] = {}
            case "option":
                self.options[list(self.options)[-1]][found["value"]] = ""

    def handle_endtag(self, tag):
        self._inside = "" if tag == self._inside else self._inside

    def handle_data(self, data):
        self.text.append(data)
        if self._inside in ("td", "th"):
            self.tables[-1][-1][-1] += data
        elif self._inside == "option":
            shown = self.options[list(self.options)[-1]]
            shown[list(shown)[-1]] += data


def column(table, name, system):
    rows = {row[0]: dict(zip(table[0], row, strict=True)) for row in table[1:]}
    return rows[system][name]


def table_with(tables, *columns):
    """The first table that has these columns."""
    return next(table for table in tables if set(columns) <= set(table[0]))


def test_the_json_file_is_the_report(folder):
    text = (folder / "report.json").read_text()
    assert Report.model_validate_json(text) == make_report()
    assert text.startswith('{\n "format_version": 1,')


def test_markdown_tables_hold_the_numbers(folder):
    tables = markdown_tables((folder / "report.md").read_text())
    scores = table_with(tables, "likelihood, %", "errors")
    assert column(scores, "likelihood, %", "c2c") == "75.0 (62.5–87.5)"
    assert column(scores, "generate, %", "c2c") == "50.0 (37.5–62.5)"
    assert column(scores, "n", "c2c") == "8"
    assert column(scores, "unread, %", "c2c") == "25.0"
    assert column(scores, "− receiver", "c2c") == "+50.0 (37.5–62.5)"
    # Stored the other way round, sharer − c2c.
    assert column(scores, "− sharer", "c2c") == "+12.5 (0.0–25.0)"
    assert column(scores, "− receiver", "t2t") == "–"
    pairs = table_with(tables, "pair", "only the first right")
    assert ["c2c − receiver", "likelihood", "+50.0 (37.5–62.5)", "8", "<0.001", "5", "1"] in pairs
    assert column(table_with(tables, "cache crossed"), "cache crossed", "c2c") == "24.6 kB"
    assert column(table_with(tables, "cache crossed"), "tokens sharer read", "c2c") == "140.5"
    assert column(table_with(tables, "calibration error"), "calibration error", "c2c") == "0.062"
    assert column(table_with(tables, "p99"), "p99", "c2c") == "3.75"
    assert column(table_with(tables, "fuse", "decode"), "fuse", "receiver") == "0.125"
    (gap,) = [table for table in tables if table[0] == ["system", "ARC-Easy, %"]]
    assert gap[1:] == [["c2c", "133.3 (120.8–145.8)"]]


def test_nats_are_no_percentages(folder):
    tables = markdown_tables((folder / "report.md").read_text())
    scores = table_with(tables, "nats, less is better", "errors")
    assert column(scores, "nats, less is better", "c2c") == "1.750 (1.625–1.875)"
    assert column(scores, "− receiver", "c2c") == "−0.500 (−0.625 to −0.375)"
    assert column(scores, "p", "c2c") == "–"


def test_markdown_says_what_was_run(folder):
    text = (folder / "report.md").read_text()
    settings = dict(table_with(markdown_tables(text), "setting")[1:])
    wanted = {
        "fusers": "demo", "seed": "7", "forms.receiver.choice": "chat", "router.share": "0.5",
        "versions.torch": "2.13.0", "peak_memory_bytes.cpu": "4.34 GB", "seconds": "1 h 02 min",
    }  # fmt: skip
    assert wanted.items() <= settings.items()
    assert text.startswith("# small ← big\n")
    assert "```bash\nc2c eval --limit 8\nc2c eval --limit 8 --systems c2c\n```" in text
    assert "Transfer is shown." in text
    assert "Transfer is not shown." in text
    assert ["ARC-Easy", "choice", "8", "3 marked wrong", "org/set@abc", "CC BY-SA 4.0"] in table_with(
        markdown_tables(text), "licence"
    )
    assert column(table_with(markdown_tables(text), "system", "what it is"), "what it is", "t2t") == "what t2t is"


def test_html_shows_the_tables_of_markdown(folder):
    page = Page((folder / "report.html").read_text())
    in_markdown = markdown_tables((folder / "report.md").read_text())
    assert page.tables[: len(in_markdown)] == in_markdown
    assert len(in_markdown) > 10


def test_figures_are_images_linked_from_markdown_and_embedded_in_html(folder):
    linked = re.findall(r"\]\((figures/[^)]+)\)", (folder / "report.md").read_text())
    assert sorted(linked) == sorted(f"figures/{path.name}" for path in (folder / "figures").iterdir())
    embedded = [v for k, v in Page((folder / "report.html").read_text()).attributes if k == "src"]
    assert [base64.b64decode(v.removeprefix("data:image/png;base64,")) for v in embedded] == [
        (folder / path).read_bytes() for path in linked
    ]
    for path in linked:
        with Image.open(folder / path) as image:
            image.load()
            assert min(image.size) > 40


def test_html_asks_nobody_for_anything(folder):
    text = (folder / "report.html").read_text()
    page = Page(text)
    links = [value for name, value in page.attributes if name in ("src", "href", "action", "data", "poster")]
    assert links and all(link.startswith(("data:", "#")) for link in links)
    assert not {"link", "iframe", "object", "embed", "base"} & set(page.tags)
    assert not re.search(r"url\(|@import|https?://", text)


ALL = {
    "accuracy",
    "controls",
    "gap_recovered",
    "who_is_right",
    "accuracy_latency",
    "latency_stages",
    "subjects_arc_easy",
}


@pytest.mark.parametrize(
    ("report", "missing"),
    [
        (make_report(), set()),
        (make_report(latency={}), {"accuracy_latency", "latency_stages"}),
        (make_report({"arc_easy": choice_task(gap_recovered={})}), {"gap_recovered"}),
        (
            make_report({"arc_easy": choice_task(subjects={s: {"c2c": estimate(0.5)} for s in "abc"})}),
            {"subjects_arc_easy"},
        ),
        (make_report({"arc_easy": choice_task(systems={"receiver": 0.5, "c2c": 0.75}, pairs=[])}), {"controls"}),
        (
            make_report({"arc_easy": choice_task(systems={"mine": 0.5}, pairs=[], gap_recovered={})}, latency={}),
            ALL - {"accuracy", "subjects_arc_easy"},
        ),
        (make_report({"chats": nats_task()}), {"gap_recovered", "who_is_right", "subjects_arc_easy"}),
    ],
    ids=["all", "no-latency", "no-gap", "three-subjects", "no-control", "one-stranger", "nats-only"],
)
def test_a_figure_without_data_is_left_out(report, missing, tmp_path):
    stale = tmp_path / "figures" / "accuracy_latency.png"
    stale.parent.mkdir()
    stale.write_bytes(b"of an earlier report")
    written(report, tmp_path)
    assert {path.stem for path in (tmp_path / "figures").iterdir()} == ALL - missing
    assert set(re.findall(r"figures/(\w+)\.png", (tmp_path / "report.md").read_text())) == ALL - missing
    assert Page((tmp_path / "report.html").read_text()).tags.count("img") == len(ALL - missing)


def test_a_report_without_any_rows_can_be_written(tmp_path):
    written(make_report({}, latency={}), tmp_path)
    assert not list((tmp_path / "figures").iterdir())
    assert "small ← big" in (tmp_path / "report.html").read_text()


def hostile_report():
    task = choice_task(title=HOSTILE, systems={**SYSTEMS, HOSTILE: 0.5}, licence=HOSTILE, source=HOSTILE)
    task.dropped = {HOSTILE: 1}
    task.subjects |= {HOSTILE: {"c2c": estimate(0.5)}}
    task.transfer[0].sentence = HOSTILE
    report = make_report({"../a b": task})
    report.latency |= latency(**{HOSTILE: 1.0})
    report.run |= {"receiver": HOSTILE, HOSTILE: HOSTILE, "commands": [f"c2c ```\n{HOSTILE}"]}
    return report


def hostile_rows(report):
    rows = make_rows(report)
    for row in rows:
        row.answer = row.message = row.route = row.extracted = row.target = row.subject = HOSTILE
        if row.system == "sharer":
            row.error = HOSTILE
    return rows


def test_hostile_text_is_shown_and_does_nothing(tmp_path):
    report = hostile_report()
    rows = hostile_rows(report)
    write(report, rows, tmp_path, {(row.task, row.id): f"{HOSTILE} asked" for row in rows})

    page = Page((tmp_path / "report.html").read_text())
    assert page.tags.count("script") == 1, "only the page's own"
    text = "".join(page.text)
    assert f"{HOSTILE} asked" in text and f"✗ {HOSTILE}" in text
    assert not [name for name, _ in page.attributes if name.startswith("on")]

    markdown = (tmp_path / "report.md").read_text()
    outside_code = re.sub(r"(?s)````bash\n.*?\n````", "", markdown)
    assert outside_code != markdown, "the command's own fence cannot end the block"
    assert "<" not in outside_code
    for table in markdown_tables(outside_code):
        assert len({len(row) for row in table}) == 1, "no cell is cut by a pipe"
    assert HOSTILE in {cell for table in markdown_tables(outside_code) for row in table for cell in row}
    assert all(path.resolve().parent == tmp_path / "figures" for path in tmp_path.rglob("*.png"))


def test_the_same_rows_in_any_order_give_the_same_bytes(tmp_path):
    report = make_report()
    rows = make_rows(report)
    first = written(report, tmp_path / "first", rows)
    random.Random(0).shuffle(rows)
    second = written(report, tmp_path / "second", rows)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    for path in files:
        assert (first / path).read_bytes() == (second / path).read_bytes(), path


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda rows, asked: rows.append(rows[0]), "answered a row twice; got arc_easy, r0, receiver"),
        (lambda rows, asked: rows.append(rows[0].model_copy(update={"task": "other"})), "the report lacks; got other"),
        (lambda rows, asked: asked.pop(("arc_easy", "r3")), "no question; got arc_easy, r3"),
    ],
    ids=["twice", "unknown-task", "no-question"],
)
def test_rows_that_do_not_belong_to_the_report_are_refused(spoil, words, tmp_path):
    report = make_report()
    rows = make_rows(report)
    asked = questions(rows)
    spoil(rows, asked)
    with pytest.raises(DataError, match=words):
        write(report, rows, tmp_path / "out", asked)
    assert not (tmp_path / "out").exists(), "nothing is written by halves"


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    import sys

    for name in [name for name in sys.modules if name.startswith("cache2cache.evaluate.report.figures.style")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delattr("cache2cache.evaluate.report.figures.style")
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingExtraError, match=r"cache2cache\[eval\]"):
        written(make_report(), tmp_path)


def test_samples_prefer_disagreement_and_share_room_among_tasks():
    report = make_report({"big": choice_task(), "small": choice_task(title="Small")})
    rows = make_rows(report, lambda system, number: number % 5 == 0 and system == "c2c", count=500)
    rows = [row for row in rows if row.task == "big" or int(row.id[1:]) < 30]
    found = sample(report, rows, questions(rows))
    assert [one.task for one in found] == ["big"] * (MOST - 30) + ["small"] * 30
    disputed = [one for one in found if one.task == "big" and one.right]
    assert len(disputed) == 100, "all rows on which systems disagree"
    assert all(one.right == ["c2c"] and "receiver" in one.wrong for one in disputed)
    assert [one.id for one in disputed] == sorted(one.id for one in disputed)


def test_a_sampled_answer_shows_letters_metrics_and_errors():
    report = make_report({"arc_easy": choice_task(systems={"receiver": 0.5, "c2c": 0.5})})
    rows = [
        RowRecord(task="arc_easy", id="1", subject="s", system="c2c", target="B", metrics={"likelihood": 1.0},
                  letter_logprobs=[math.log(0.25), math.log(0.75)]),
        RowRecord(task="arc_easy", id="1", subject="s", system="receiver", target="B", error="ValueError: no"),
    ]  # fmt: skip
    (one,) = sample(report, rows, questions(rows))
    receiver, c2c = one.answers
    assert (receiver.system, receiver.right, receiver.row.error) == ("receiver", False, "ValueError: no")
    assert (c2c.right, c2c.metrics) == (True, "likelihood 1")
    assert [letter for letter, _ in c2c.letters] == ["A", "B"]
    assert [probability for _, probability in c2c.letters] == pytest.approx([0.25, 0.75])


def test_where_less_is_better_nothing_is_right_or_wrong():
    report = make_report({"chats": nats_task()})
    (one, *_) = sample(report, rows := make_rows(report), questions(rows))
    assert one.right == one.wrong == []


def test_the_filter_finds_rows_by_who_is_right(tmp_path):
    report = make_report({"arc_easy": choice_task()})
    rows = make_rows(report, lambda system, number: system == "c2c" or (system == "sharer" and number == 0))
    page = Page((written(report, tmp_path, rows) / "report.html").read_text())
    number = {shown: value for value, shown in page.options["right"].items()}
    right = [value for name, value in page.attributes if name == "data-right"]
    assert page.options["right"] == page.options["wrong"]
    assert page.options["task"] == {"": "all", "arc_easy": "ARC-Easy"}
    assert sum(f" {number['c2c']} " in one for one in right) == 8
    assert sum(f" {number['sharer']} " in one for one in right) == 1
    assert sum(f" {number['receiver']} " in one for one in right) == 0


def printed(report, width=120):
    console = Console(width=width, file=io.StringIO(), record=True)
    print_table(report, console)
    return console.export_text()


def test_the_terminal_table_fits_120_columns():
    many = {
        **SYSTEMS,
        "t2t-fair": 0.5,
        "routing": 0.5,
        "zeroed": 0.25,
        "random": 0.25,
        "self": 0.25,
        "without-sharer": 0.25,
    }
    task = choice_task(systems=many)
    task.pairs = [pair(a, b, -0.5, p=0.0001) for a in many for b in ("receiver", "sharer") if a != b]
    task.systems["c2c"].errors = 3
    text = printed(make_report({"arc_easy": task, "chats": nats_task()}))
    assert max(map(len, text.splitlines())) <= 120
    assert "…" not in text
    lines = text.splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith("c2c "))
    first, second = lines[at].split(), lines[at + 1].split()
    expected = "c2c 75.0 50.0 8 3 25.0 −50.0 p<0.001 −50.0 p<0.001 r 120 + 2 1.25"
    assert first == expected.split()
    assert second == ["62.5–87.5", "37.5–62.5", "−62.5", "to", "−37.5", "−62.5", "to", "−37.5", "s", "140", "+", "0"]
    assert [line for line in lines if line.startswith("Transfer")] == ["Transfer is shown.", "Transfer is not shown."]
    assert "1.750" in text and "less is better: nats" in text


@pytest.mark.parametrize("width", [60, 80, 100])
def test_names_of_systems_stay_whole_in_a_narrow_terminal(width):
    task = choice_task(systems={**SYSTEMS, "without-sharer": 0.25})
    lines = printed(make_report({"arc_easy": task}), width).splitlines()
    assert [line.split()[0] for line in lines if line.startswith("without")] == ["without-sharer"]


def test_the_terminal_shows_markup_in_names_as_it_is():
    assert "[bold]x[/bold]" in printed(make_report({"x": choice_task(title="[bold]x[/bold]")}))


def test_shares_and_nats_are_drawn_on_axes_of_their_own():
    with style.styled():
        figure = dots.accuracy(make_report())
    assert figure is not None
    arc, chats = figure.axes
    assert (arc.get_xlim(), arc.get_xlabel()) == ((0, 100), "likelihood, %")
    assert chats.get_xlabel() == "nats, less is better"
    assert [label.get_text() for label in arc.get_yticklabels()] == list(SYSTEMS)
    assert chats.get_xlim()[1] < 5


def test_controls_are_drawn_against_the_receiver():
    with style.styled():
        figure = dots.controls(make_report({"arc_easy": choice_task()}))
    assert figure is not None
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["c2c", "mismatched"]
    (band,) = axes.patches
    assert (band.get_x(), band.get_x() + band.get_width()) == pytest.approx((12.5, 37.5))  # type: ignore[attr-defined]


def test_a_system_looks_the_same_whatever_stands_beside_it():
    alone, together = style.looks(["c2c"]), style.looks([*SYSTEMS, "c2c-1", "mine", "yours"])
    assert alone["c2c"] == together["c2c"]
    assert len({(look.colour, look.marker, look.hollow) for look in together.values()}) == len(together)
    assert together["c2c-1"].colour == together["c2c"].colour


def test_the_upset_figure_counts_rows_that_all_have_answered():
    report = make_report({"arc_easy": choice_task(systems={"receiver": 0.5, "sharer": 0.5, "c2c": 0.5})})
    right = {0: ["c2c"], 1: ["c2c"], 2: ["c2c"], 3: ["sharer", "c2c"], 4: ["sharer", "c2c"], 5: []}
    rows = make_rows(report, lambda system, number: system in right.get(number, ["receiver"]))
    rows = [row for row in rows if not (row.system == "sharer" and row.id in ("r6", "r7"))]
    with style.styled():
        figure = upset.who_is_right(report, rows)
    assert figure is not None
    bars, matrix, totals = figure.axes
    assert [bar.get_height() for bar in bars.patches] == [3, 2, 1]  # type: ignore[attr-defined]
    assert [bar.get_width() for bar in totals.patches] == [0, 2, 5]  # type: ignore[attr-defined]
    members = [np.asarray(line.get_xdata()).tolist() for line in matrix.lines[1:6:2]]
    assert members == [[], [1], [0, 1]], "receiver, sharer, c2c; columns from the largest set"
    assert bars.get_title(loc="left").startswith("6 rows")


def test_errors_are_wrong_in_the_upset_figure():
    report = make_report({"arc_easy": choice_task(systems={"receiver": 0.5, "c2c": 0.5})})
    rows = make_rows(report, lambda system, number: True)
    for row in rows:
        if row.system == "receiver":
            row.error = "RuntimeError: no"
    with style.styled():
        figure = upset.who_is_right(report, rows)
    assert figure is not None
    assert [bar.get_width() for bar in figure.axes[2].patches] == [0, 8]  # type: ignore[attr-defined]


def test_stacked_stages_add_up_to_the_mean():
    with style.styled():
        figure = costs.latency_stages(make_report(latency=latency(receiver=0.5, c2c=1.0)))
    assert figure is not None
    (axes,) = figure.axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]  # type: ignore[union-attr]
    assert labels == ["fuse", "decode", "between stages"]
    ends = [patch.get_x() + patch.get_width() for patch in axes.patches]  # type: ignore[attr-defined]
    assert ends[-2:] == pytest.approx([0.5, 1.0])


def test_the_heat_map_shows_the_subjects_with_the_most_rows():
    task = choice_task(subjects={f"s{i:02}": {"c2c": estimate(i / 100, half=0.0, n=i)} for i in range(70)})
    with style.styled():
        figure = heat.subjects(task)
    assert figure is not None
    axes = figure.axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [f"s{i:02}  ({i})" for i in range(10, 70)]
    shown = axes.images[0].get_array()
    assert shown is not None
    assert shown[:, 0].tolist() == pytest.approx([float(i) for i in range(10, 70)])
    assert "60 of 70" in axes.get_xlabel()


@pytest.mark.parametrize(
    ("write_number", "value", "text"),
    [
        (numbers.p_value, 0.0009, "<0.001"),
        (numbers.p_value, 0.001, "0.001"),
        (numbers.p_value, 1.0, "1.000"),
        (numbers.p_value, None, "–"),
        (numbers.seconds, 0.0, "0"),
        (numbers.seconds, 0.01234, "0.0123"),
        (numbers.seconds, 1.234, "1.23"),
        (numbers.seconds, 12.34, "12.3"),
        (numbers.seconds, 1234.5, "1234"),
        (numbers.size, 812, "812 B"),
        (numbers.size, 24_576, "24.6 kB"),
        (numbers.size, 4.34e9, "4.34 GB"),
        (numbers.duration, 8.25, "8.2 s"),
        (numbers.duration, 750, "12 min 30 s"),
        (numbers.duration, 3599.9, "1 h 00 min"),
    ],
)
def test_numbers_as_text(write_number, value, text):
    assert write_number(value) == text


def scale(share):
    return numbers.Scale("m", share=share, lower_is_better=False)


@pytest.mark.parametrize(
    ("got", "text"),
    [
        (scale(True).number(0.6625), "66.2"),
        (scale(True).number(-0.0001), "0.0"),
        (scale(True).number(math.nan), "–"),
        (scale(False).number(-1.5), "−1.500"),
        (scale(True).signed(0.038), "+3.8"),
        (scale(True).signed(-0.038), "−3.8"),
        (scale(True).estimate(None), "–"),
        (scale(True).difference(Estimate(value=0.038, low=-0.008, high=0.071, n=9)), "+3.8 (−0.8 to 7.1)"),
        (scale(True).difference(Estimate(value=0.038, low=0.008, high=0.071, n=9)), "+3.8 (0.8–7.1)"),
    ],
)
def test_estimates_as_text(got, text):
    assert got == text


@pytest.mark.parametrize(
    ("value", "lower", "share"), [(0.5, [], True), (0.5, ["likelihood"], False), (12.0, [], False), (-0.5, [], False)]
)
def test_a_share_lies_between_0_and_1_and_more_of_it_is_better(value, lower, share):
    task = choice_task(systems={"c2c": value}, lower_is_better=lower)
    assert numbers.scale_of(task, "likelihood").share is share


def test_a_difference_is_found_whichever_way_round_it_was_stored():
    task = choice_task()
    turned = numbers.against(task, "c2c", "sharer")
    assert turned is not None
    assert (turned.difference.value, turned.difference.low, turned.difference.high) == (0.125, 0.0, 0.25)
    assert (turned.only_a, turned.only_b, turned.p) == (2, 1, 0.25)
    assert numbers.against(task, "t2t", "sharer") is None


def test_systems_are_listed_in_one_order():
    names = ["mine", "random", "c2c-10", "c2c-2", "sharer-2", "c2c", "t2t-fair", "sharer", "a-2", "receiver", "t2t"]
    assert ordered(names) == [
        "receiver", "sharer", "sharer-2", "t2t", "t2t-fair", "c2c", "c2c-2", "c2c-10", "random", "a-2", "mine",
    ]  # fmt: skip


def test_stages_are_listed_as_they_happen():
    assert ordered_stages(["decode", "zip", "fuse", "tokenise", "embed"]) == [
        "tokenise",
        "fuse",
        "decode",
        "embed",
        "zip",
    ]
