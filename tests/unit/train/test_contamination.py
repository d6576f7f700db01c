"""Training rows that give an evaluation away are found, named and left out."""

import json

import pytest

from cache2cache.errors import DataError
from cache2cache.train.batch import Example
from cache2cache.train.config import Machine
from cache2cache.train.contamination import Contamination, Dropped, HeldOut, read_held_out, write_dropped

WORDS = [f"word{i}" for i in range(30)]
KNOWN = Contamination([HeldOut("Which is a colour?", "test, line 1"), HeldOut(" ".join(WORDS), "test, line 2")])


def example(asked, place="train, line 1"):
    return Example([{"role": "user", "content": asked}], "A", asked, place)


@pytest.mark.parametrize(
    ("asked", "reason", "line"),
    [
        ("which IS a  colour", "same question", 1),
        ("Which is a colour?\nA. red\nB. seven\nAnswer with the letter.", "same question", 1),
        ("Answer this.\n\n which is a colour", "same question", 1),
        ("so " + " ".join(WORDS[5:18]) + " it says", "13 words in a row", 2),
        ("so " + " ".join(WORDS[5:12]) + "\n" + " ".join(WORDS[12:18]), "13 words in a row", 2),
    ],
)
def test_rows_that_ask_the_same_or_share_13_words_are_found(asked, reason, line):
    assert KNOWN.find(example(asked)) == Dropped("train, line 1", reason, f"test, line {line}")


@pytest.mark.parametrize(
    "asked",
    [
        "so " + " ".join(WORDS[5:17]) + " it says",  # 12 words
        "which is a colour, and why",
        " ".join(reversed(WORDS)),
        "",
        "?!",
    ],
)
def test_other_rows_are_not(asked):
    assert KNOWN.find(example(asked)) is None


def test_text_without_spaces_is_compared_by_its_characters():
    question = "下列关于细胞膜结构与功能的叙述中，哪一项是正确的？"
    known = Contamination([HeldOut(question, "ceval, row 7"), HeldOut("これは何ですか", "test, line 2")])
    assert known.find(example(f"请回答下面的问题：{question}。请给出理由")) == Dropped(
        "train, line 1", "13 words in a row", "ceval, row 7"
    )
    assert known.find(example(f"答える：\n{'これは何ですか'}。")).reason == "same question"
    assert known.find(example("下列关于细胞膜结构与成分的叙述中，哪一项是错误的？")) is None, "12 in a row at most"


def test_an_earlier_turn_gives_away_as_much():
    turns = [("user", "Which is a colour?"), ("assistant", "Red."), ("user", "Why?")]
    chat = Example([{"role": role, "content": text} for role, text in turns], "So it is.", "Why?", "train, line 3")
    assert KNOWN.find(chat) == Dropped("train, line 3", "same question", "test, line 1")
    said = Example([{"role": role, "content": text} for role, text in turns[1:]], "So it is.", "Why?", "train, line 3")
    assert KNOWN.find(said) is None


def test_questions_without_words_are_compared_by_their_symbols():
    known = Contamination([HeldOut("∑ = ?", "test, line 1")])
    assert known.find(example(" ∑ = ?")) and not known.find(example("∏ = ?"))


def test_validation_rows_may_share_instructions_but_not_questions():
    instructions = " ".join(WORDS)
    known = Contamination([], [example(f"{instructions} first", "dev, line 7")])
    assert known.find(example(f"{instructions} second")) is None
    assert known.find(example(f"{instructions} first")) == Dropped("train, line 1", "same question", "dev, line 7")


def test_a_chat_that_asks_nothing_is_asked_by_no_blank_line():
    known = Contamination([], [example(" ", "dev, line 1"), example("", "dev, line 2")])
    assert known.find(example("A passage.\n\nA question?")) is None and known.find(example("")) is None


def test_what_is_kept_out_is_remembered_once(tmp_path):
    known = Contamination([HeldOut("Which is a colour?", "test, line 1")])
    rows = [example("hi", "a, line 1"), example("Which is a colour?", "ä, line 2")]
    assert [known.keep(row) for row in rows * 2] == [True, False] * 2
    write_dropped(tmp_path / "dropped.jsonl", known.dropped)
    (line,) = (tmp_path / "dropped.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line) == {"place": "ä, line 2", "reason": "same question", "held_out": "test, line 1"}


QUESTION = {"id": "7", "subject": "s", "question": "Which is a colour?", "choices": ["red", "seven"], "answer": 0}
CHAT = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "1"}, {"role": "user", "content": "Two?"}]


def test_held_out_questions_come_from_files_of_every_form_and_from_tasks(tmp_path):
    (tmp_path / "arc_easy").mkdir()
    rows = [
        QUESTION,
        QUESTION | {"question": "Which is none?", "error_type": "wrong_groundtruth"},
        {"question": "Who?", "answers": ["me"]},
        {"messages": [*CHAT, {"role": "assistant", "content": "2"}]},
    ]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "arc_easy" / "test.jsonl").write_text(json.dumps(QUESTION) + "\n")
    found = read_held_out(["own.jsonl", "ARC-Easy"], Machine(data_dir=tmp_path))
    assert found == [
        HeldOut("Which is a colour?", "own.jsonl, line 1"),
        HeldOut("Which is none?", "own.jsonl, line 2"),
        HeldOut("Who?", "own.jsonl, line 3"),
        HeldOut("Two?", "own.jsonl, line 4"),
        HeldOut("Which is a colour?", "arc_easy, row 7"),
    ]


@pytest.mark.parametrize(
    "row", [{"text": "free"}, {"question": " "}, {"question": 3}, {"messages": []}, {"messages": CHAT[1:2]}]
)
def test_held_out_rows_without_a_question_are_named(tmp_path, row):
    (tmp_path / "own.jsonl").write_text(json.dumps(QUESTION) + "\n" + json.dumps(row) + "\n")
    with pytest.raises(DataError, match=r"own\.jsonl, line 2: "):
        read_held_out(["own.jsonl"], Machine(data_dir=tmp_path))


@pytest.mark.parametrize(("name", "words"), [("absent.jsonl", "no such data file"), ("arc_eazy", "arc_easy")])
def test_held_out_names_that_are_nothing_are_refused(tmp_path, name, words):
    with pytest.raises(DataError, match=words):
        read_held_out([name], Machine(data_dir=tmp_path))
