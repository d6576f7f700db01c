"""Reading rows: every form, every place they lie in, samples and mixtures that follow their seed, and bad rows named."""

import json
from collections import Counter
from itertools import islice, pairwise

import datasets
import pytest
import zstandard

from cache2cache.errors import DataError, DownloadError
from cache2cache.train.config import Machine, Source
from cache2cache.train.sources import read, stream

QUESTION = {"question": "Which is a colour?", "choices": ["red", "seven"], "answer": 0}
CHAT = {
    "messages": [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "hi"},
        {"role": "assistant", "content": "hello"},
        {"role": "user", "content": "bye"},
        {"role": "assistant", "content": "so long"},
    ]
}


@pytest.fixture
def machine(tmp_path):
    return Machine(data_dir=tmp_path)


@pytest.fixture(autouse=True)
def _no_shared_cache(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(folder, name, rows):
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path = folder / name
    if name.endswith(".zst"):
        path.write_bytes(zstandard.compress(text.encode()))
    elif name.endswith(".parquet"):
        datasets.Dataset.from_list(rows).to_parquet(path)
    else:
        path.write_text(text)
    return Source(path=name)


def numbered(count, word="row"):
    return [QUESTION | {"question": f"{word} {i}?"} for i in range(count)]


def asked(examples):
    return [example.asked for example in examples]


def one(source, machine, turns="last"):
    return read([source], machine, seed=0, turns=turns)


@pytest.mark.parametrize(("name", "place"), [("a.jsonl", "line 2"), ("a.jsonl.zst", "line 2"), ("a.parquet", "row 2")])
def test_the_same_rows_are_read_from_every_kind_of_file(tmp_path, machine, name, place):
    source = write(tmp_path, name, [QUESTION, QUESTION | {"question": "And a number?", "answer": 1}])
    first, second = one(source, machine)
    assert first.messages[-1]["content"] == "Question: Which is a colour?\nA. red\nB. seven\nAnswer with the letter."
    assert (second.asked, second.response, second.place) == ("And a number?", "B", f"{name}, {place}")


def test_chats_in_parquet_are_read_too(tmp_path, machine):
    (example,) = one(write(tmp_path, "chats.parquet", [CHAT]), machine)
    assert (example.messages, example.response) == (CHAT["messages"][:-1], "so long")


@pytest.mark.parametrize("name", ["short.jsonl", "short.parquet"])
def test_short_answers_are_asked_as_the_evaluation_asks_a_file_of_them(tmp_path, machine, name):
    rows = [
        {"question": "What colour?", "context": None, "answers": ["blue", "Blue"]},
        {"question": "Where?", "answers": ["here"], "context": "It is here."},
    ]
    bare, passage = one(write(tmp_path, name, rows), machine)
    assert (bare.response, bare.asked) == ("blue", "What colour?")
    assert bare.messages == [{"role": "user", "content": "Question: What colour?\nAnswer with a few words."}]
    assert passage.messages[0]["content"].startswith("Context: It is here.\n\nQuestion: Where?\n")


def test_a_short_answer_may_stand_alone(tmp_path, machine):
    (example,) = one(write(tmp_path, "a.jsonl", [{"question": "How many?", "answer": "7"}]), machine)
    assert example.response == "7"


def test_a_chat_is_one_example_or_one_for_each_answer(tmp_path, machine):
    source = write(tmp_path, "chats.jsonl", [CHAT])
    (last,) = one(source, machine)
    assert (last.messages, last.response, last.asked) == (CHAT["messages"][:4], "so long", "bye")
    first, second = one(source, machine, turns="every")
    assert (first.messages, first.response, first.asked) == (CHAT["messages"][:2], "hello", "hi")
    assert (second.messages, second.response) == (last.messages, last.response)
    assert (first.place, second.place) == ("chats.jsonl, line 1, message 2", "chats.jsonl, line 1, message 4")


def test_columns_of_other_rows_are_null(tmp_path, machine):
    """As Parquet fills them; and brackets in a path are no pattern."""
    short = {"question": "Who?", "answer": "me", "error_type": "my own column"}
    rows = [QUESTION | {"error_type": "ok", "answer": "red"}, short, CHAT, QUESTION | {"answer": "red"}]
    columns = sorted({column for row in rows for column in row})
    full = [{column: row.get(column) for column in columns} for row in rows]
    (tmp_path / "run[1]").mkdir()
    datasets.Dataset.from_list(full).to_parquet(tmp_path / "run[1]" / "a.parquet")
    write(tmp_path, "a.jsonl", full)
    for path in ("run[1]/a.parquet", "a.jsonl"):
        assert [row.response for row in one(Source(path=path), machine)] == ["A", "me", "so long", "A"]


def test_a_tasks_training_rows_are_asked_as_the_evaluation_asks_them(tmp_path, machine):
    (tmp_path / "squad").mkdir()
    row = {"title": "t", "context": "The sky is blue.", "question": "What colour?", "answers": ["blue", "Blue"]}
    write(tmp_path, "squad/train.jsonl", [{"id": "x", **row}])
    (example,) = one(Source(task="squad"), machine)
    assert example.messages[0]["content"].startswith("Context: The sky is blue.")
    assert (example.response, example.asked, example.place) == ("blue", "What colour?", "squad, row x")


def test_hub_data_sets_are_asked_for_as_the_recipe_says(machine, monkeypatch):
    calls = []

    def load_dataset(*args, **kwargs):
        calls.append((args, kwargs))
        return numbered(2)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    source = Source(hub="org/set", subset="part", split="train", revision="abc")
    assert [example.place for example in one(source, machine)] == [f"org/set/part/train, row {i}" for i in (1, 2)]
    list(next(stream([source], machine, seed=0, turns="last", buffer=4)))
    asks = {"split": "train", "revision": "abc"}
    assert calls == [(("org/set", "part"), asks | {"streaming": streaming}) for streaming in (False, True)]


@pytest.mark.parametrize(("problem", "expected"), [(ValueError, DataError), (ConnectionError, DownloadError)])
def test_a_hub_data_set_that_is_not_there_is_named(machine, monkeypatch, problem, expected):
    def load_dataset(*args, **kwargs):
        raise problem("no")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(expected, match=r"org/set"):
        one(Source(hub="org/set"), machine)


_ANSWER = {"role": "assistant", "content": "yes"}


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "free"}, "no known form; got text; allowed: question"),
        ({}, "an empty row"),
        (QUESTION | {"answer": 2}, "none of the choices"),
        (QUESTION | {"choices": ["red"]}, "choices"),
        (QUESTION | {"error_type": "wrong_groundtruth"}, "marked as wrong; got error_type 'wrong_groundtruth'"),
        ({"choices": ["a", "b"], "answer": 0}, "question"),
        ({"question": "Which?"}, "either answer or answers; got question"),
        ({"question": "Which?", "answer": "a", "answers": ["a"]}, "either answer or answers"),
        ({"question": "Which?", "answers": []}, "answers: "),
        (
            {"question": "Which?", "options": ["a", "b"], "answer": 1},
            "number as the answer of a row without choices; got 1",
        ),
        ({"question": " ", "answer": "a"}, "question: "),
        ({"question": "Which?", "answer": " "}, "answers.0: "),
        ({"messages": []}, "conversation is empty"),
        ({"messages": "hi"}, "list of messages"),
        ({"messages": [{"role": "user", "content": "hi \ud83d"}, _ANSWER]}, "message 0 is not Unicode text"),
        ({"messages": CHAT["messages"][:4]}, "does not end with an answer; got user"),
        ({"messages": [{"role": "human", "content": "hi"}, _ANSWER]}, "unknown role"),
        ({"messages": [_ANSWER]}, "message 0, an answer, does not follow a question; got nothing"),
        ({"messages": [*CHAT["messages"], _ANSWER]}, "message 5, an answer, does not follow a question; got assistant"),
        (
            {"messages": [*CHAT["messages"][:2], {"role": "assistant", "content": " "}]},
            "message 2, an answer, is empty",
        ),
    ],
)
def test_a_row_of_another_form_is_named(tmp_path, machine, row, words):
    source = write(tmp_path, "a.jsonl", [QUESTION, row])
    for attempt in (
        lambda: one(source, machine),
        lambda: list(next(stream([source], machine, seed=0, turns="last", buffer=2))),
    ):
        with pytest.raises(DataError) as error:
            attempt()
        assert "a.jsonl, line 2: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize("name", ["absent.jsonl", "absent.parquet", "rows.csv"])
def test_a_file_that_cannot_be_read_is_named(machine, name):
    with pytest.raises(DataError, match=name):
        one(Source(path=name), machine)


def test_damaged_files_are_named(tmp_path, machine):
    (tmp_path / "bad.parquet").write_bytes(b"no parquet")
    (tmp_path / "bad.jsonl").write_text("{")
    for name in ("bad.parquet", "bad.jsonl"):
        with pytest.raises(DataError, match=name):
            one(Source(path=name), machine)


def test_a_task_that_has_no_training_rows_is_refused(tmp_path, machine):
    with pytest.raises(DataError, match="unknown task"):
        one(Source(task="arc_eazy"), machine)


def test_a_sample_follows_its_seed_and_counts_only_rows_that_are_kept(tmp_path, machine):
    source = write(tmp_path, "a.jsonl", numbered(50)).model_copy(update={"limit": 10})
    first, again, other = (asked(read([source], machine, seed=seed, turns="last")) for seed in (0, 0, 1))
    assert first == again != other and len(set(first)) == 10
    kept = read([source], machine, seed=0, turns="last", keep=lambda row: row.asked < "row 2")
    assert len(kept) == 10 and all(row.asked < "row 2" for row in kept)
    with pytest.raises(DataError, match="got 2, and 48 that are kept out; allowed: at least 10"):
        read([source], machine, seed=0, turns="last", keep=lambda row: row.asked in ("row 1?", "row 2?"))


def test_a_sample_of_neighbours_is_made_of_runs(tmp_path, machine):
    source = write(tmp_path, "a.jsonl", numbered(48)).model_copy(update={"limit": 12, "neighbours": 4})
    first, again, other = (asked(read([source], machine, seed=seed, turns="last")) for seed in (0, 0, 1))
    assert first == again != other
    runs = [[f"row {start + i}?" for i in range(4)] for start in range(0, 48, 4)]
    assert all(first[i : i + 4] in runs for i in (0, 4, 8)) and len(set(first)) == 12


@pytest.mark.parametrize("part", [{}, {"limit": 40, "neighbours": 8}])
def test_rows_that_are_read_apart_do_not_follow_one_another(tmp_path, machine, part):
    source = write(tmp_path, "a.jsonl", numbered(48)).model_copy(update=part)

    def neighbours(rows):
        numbers = [int(row.asked.split()[1].rstrip("?")) for row in rows]
        return sum(abs(a - b) == 1 for a, b in pairwise(numbers))

    together, apart = (read([source], machine, seed=0, turns="last", apart=apart) for apart in (False, True))
    assert sorted(asked(together)) == sorted(asked(apart))
    assert neighbours(together) > 30 > 10 > neighbours(apart)


def test_a_tasks_neighbours_are_those_that_were_published(tmp_path, machine):
    (tmp_path / "squad").mkdir()
    rows = [
        {"id": f"{i}", "title": "t", "context": f"It is {i // 4}.", "question": f"What is {i}?", "answers": ["it"]}
        for i in range(40)
    ]
    write(tmp_path, "squad/train.jsonl", rows)
    found = one(Source(task="squad", limit=8, neighbours=4), machine)
    assert len({example.messages[0]["content"].split("\n")[0] for example in found}) == 2


def test_rows_know_what_is_learned_of_them(tmp_path, machine):
    plain = write(tmp_path, "a.jsonl", numbered(4))
    kept = write(tmp_path, "b.jsonl", numbered(3)).model_copy(update={"learn": "receiver"})
    expected = [False] * 4 + [True] * 3
    assert [row.alone for row in read([plain, kept], machine, seed=0, turns="last")] == expected
    streamed = next(stream([plain, kept], machine, seed=0, turns="last", buffer=9))
    assert sorted(row.alone for row in streamed) == expected


def test_a_source_without_rows_is_an_error(tmp_path, machine):
    source = write(tmp_path, "a.jsonl", [])
    with pytest.raises(DataError, match=r"a\.jsonl has too few rows"):
        one(source, machine)
    with pytest.raises(DataError, match=r"a\.jsonl has no rows"):
        list(next(stream([source], machine, seed=0, turns="last", buffer=2)))


@pytest.fixture
def weighted(tmp_path):
    parts = (write(tmp_path, f"{word}.jsonl", numbered(400, word)) for word in ("a", "b"))
    return [part.model_copy(update={"weight": weight}) for part, weight in zip(parts, (3, 1), strict=True)]


def test_weights_are_the_proportions_until_a_source_is_used_up(machine, weighted):
    listed = asked(read(weighted, machine, seed=0, turns="last"))
    streamed = asked(next(stream(weighted, machine, seed=0, turns="last", buffer=8)))
    for rows in (listed, streamed):
        assert len(set(rows)) == len(rows), "a row came twice"
        counts = Counter(row[0] for row in rows)
        assert counts["a"] == 400 and 90 < counts["b"] < 180
    assert Counter(row[0] for row in listed[:200])["b"] in range(30, 71), "the proportions hold from the beginning"


def test_of_a_mixture_the_rows_come_from_all_of_a_file(tmp_path, machine, weighted):
    """Files are often sorted, and here one source is used up after a few rows of the other."""
    few = write(tmp_path, "few.jsonl", numbered(20, "few")).model_copy(update={"weight": 1})
    rows = asked(read([weighted[0], few], machine, seed=0, turns="last"))
    numbers = [int(row.strip("a ?")) for row in rows if row.startswith("a ")]
    assert len(numbers) < 120 and min(numbers) < 60 and max(numbers) > 340


def test_without_weights_every_row_comes_once(tmp_path, machine):
    sources = [write(tmp_path, "a.jsonl", numbered(30, "a")), write(tmp_path, "b.jsonl", numbered(5, "b"))]
    rows = asked(read(sources, machine, seed=0, turns="last"))
    assert rows == [f"a {i}?" for i in range(30)] + [f"b {i}?" for i in range(5)]
    assert sorted(asked(next(stream(sources, machine, seed=0, turns="last", buffer=4)))) == sorted(rows)


def test_each_pass_of_a_stream_has_its_own_order_which_the_seed_decides(tmp_path, machine):
    source = write(tmp_path, "a.jsonl", numbered(40))

    def passes(seed, count):
        rows = stream([source], machine, seed=seed, turns="last", buffer=16)
        return [asked(one_pass) for one_pass in islice(rows, count)]

    first, second, third = passes(0, 3)
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first
    assert passes(0, 3) == [first, second, third] and passes(1, 1) != [first]


def test_a_weighted_stream_gets_to_the_end_of_its_largest_source(tmp_path, machine):
    """A pass ends with the small source, which begins anew; the large one goes on where it was, and loses no row."""
    small, large = (
        write(tmp_path, f"{word}.jsonl", numbered(n, word)).model_copy(update={"weight": 1})
        for word, n in (("small", 10), ("large", 100))
    )
    rows = stream([small, large], machine, seed=0, turns="last", buffer=4)
    counts = Counter(row for one_pass in islice(rows, 20) for row in asked(one_pass))
    assert all(counts[f"small {i}?"] == counts["small 0?"] > 10 for i in range(10))
    assert {counts[f"large {i}?"] for i in range(100)} in ({1}, {1, 2}, {2}, {2, 3}), "one round after the other"


def test_a_stream_reads_no_further_than_it_must(tmp_path, machine):
    """Row 12 is broken, and a consumer of five rows with a buffer of four never gets there."""
    source = write(tmp_path, "a.jsonl", [*numbered(11), {"text": "broken"}])
    rows = next(stream([source], machine, seed=0, turns="last", buffer=4))
    assert len([next(rows) for _ in range(5)]) == 5


def test_a_streams_limit_takes_the_first_rows_that_are_kept(tmp_path, machine):
    source = write(tmp_path, "a.jsonl", numbered(9)).model_copy(update={"limit": 3})
    rows = next(stream([source], machine, seed=0, turns="last", buffer=1, keep=lambda row: row.asked != "row 1?"))
    assert sorted(asked(rows)) == ["row 0?", "row 2?", "row 3?"]
