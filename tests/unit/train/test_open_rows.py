"""recipes/open/rows.py: which questions can be asked without their choices, and how they then look."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from cache2cache.train.forms import examples_of

FILE = Path(__file__).parents[3] / "recipes" / "open" / "rows.py"

KEPT = {"id": 7, "subject": "s", "question": "Which gas do plants take in?", "choices": ["oxygen", "CO2 "], "answer": 1}


@pytest.fixture
def ask(tmp_path: Path, monkeypatch, capsys):
    """What the script makes of the rows of one file, when all the others are empty, and what it prints of that."""
    script = runpy.run_path(str(FILE))

    def ask(name: str, split: str, rows: list[dict]) -> tuple[list[dict], str]:
        for sets in (script["CHOICE"], script["SHORT"]):
            for folder, splits in sets.items():
                (tmp_path / folder).mkdir()
                for part in splits:
                    (tmp_path / folder / f"{part}.jsonl").write_text("")
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / name / f"{split}.jsonl").write_text(text)
        monkeypatch.setattr(sys, "argv", ["rows.py", str(tmp_path)])
        script["main"]()
        written = tmp_path / "open" / f"{name}_{split}.jsonl"
        (said,) = [line for line in capsys.readouterr().out.splitlines() if str(written) in line]
        return [json.loads(line) for line in written.read_text().splitlines()], said

    return ask


@pytest.mark.parametrize(
    "change",
    [
        {"question": "Which of the following is a gas?"},
        {"question": "Which STATEMENT is true?"},
        {"question": "What does the graph show?"},
        {"choices": ["oxygen", "all of the above"]},
        {"choices": ["oxygen", "x" * 61]},
        {"error_type": "wrong_groundtruth"},
    ],
)
def test_questions_that_need_their_choices_are_left_out_and_counted(ask, change):
    rows, said = ask("mmlu_redux", "test", [KEPT, KEPT | change, KEPT | {"error_type": "ok"}])
    assert [row["answer"] for row in rows] == ["CO2", "CO2"]
    assert said.endswith("2 of 3 questions")


def test_what_is_written_can_be_trained_on(ask):
    (row,), _ = ask("arc_easy", "train", [KEPT])
    (example,) = examples_of(row, "here", "last")
    assert (example.asked, example.response) == ("Which gas do plants take in?", "CO2")


def test_search_queries_become_questions(ask):
    rows, _ = ask("nq_open", "dev", [{"id": "a", "question": "who wrote it", "answers": ["Ann", "Anne"]}])
    assert rows == [{"id": "a", "question": "who wrote it?", "answers": ["Ann", "Anne"]}]
