"""Multiple-choice rows: strict reading, fixed samples."""

import json

import pytest

from cache2cache.errors import DataError
from cache2cache.evaluate.questions import read_questions

ROW = {"id": "1", "subject": "s", "question": "Which is a colour?", "choices": ["red", "seven"], "answer": 0}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_question_is_asked_as_one_user_turn(tmp_path):
    (question,) = read_questions(write(tmp_path / "q.jsonl", ROW))
    (message,) = question.messages()
    assert message["content"] == "Question: Which is a colour?\nA. red\nB. seven\nAnswer with the letter."
    assert (question.letters, question.letter) == ("AB", "A")


def test_rows_marked_wrong_are_left_out(tmp_path):
    path = write(tmp_path / "q.jsonl", ROW, ROW | {"id": "2", "error_type": "wrong_groundtruth"})
    assert [row.id for row in read_questions(path)] == ["1"]


def test_a_sample_follows_its_seed(tmp_path):
    path = write(tmp_path / "q.jsonl", *(ROW | {"id": str(i)} for i in range(50)))
    first, again, other = (read_questions(path, limit=10, seed=seed) for seed in (0, 0, 1))
    assert first == again != other


@pytest.mark.parametrize(
    ("row", "words"),
    [(ROW | {"answer": 2}, "answer out of range"), (ROW | {"answer": -1}, "out of range"), ({"id": "1"}, "line 1")],
)
def test_rows_of_another_form_are_refused(tmp_path, row, words):
    with pytest.raises(DataError, match=words):
        read_questions(write(tmp_path / "q.jsonl", row))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        read_questions(tmp_path / "absent.jsonl")
