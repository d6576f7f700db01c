"""recipes/question-first/rows.py: short passages, one question of each, and no article on both sides."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from cache2cache.train.forms import examples_of

FILE = Path(__file__).parents[3] / "recipes" / "question-first" / "rows.py"


def row(number: int, **change) -> dict:
    own = {
        "id": f"q{number}",
        "title": f"t{number}",
        "context": f"c{number}",
        "question": f"{number}?",
        "answers": ["a"],
    }
    return own | change


@pytest.fixture
def draw(tmp_path: Path, monkeypatch):
    """What the script makes of SQuAD's rows: (training, validation)."""
    script = runpy.run_path(str(FILE))

    def draw(rows: list[dict]) -> tuple[list[dict], list[dict]]:
        (tmp_path / "squad").mkdir(exist_ok=True)
        (tmp_path / "squad" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        monkeypatch.setattr(sys, "argv", ["rows.py", str(tmp_path)])
        script["main"]()
        train, validation = (
            [json.loads(line) for line in (tmp_path / "question-first" / f"{split}.jsonl").read_text().splitlines()]
            for split in ("train", "validation")
        )
        return train, validation

    return draw


def test_a_passage_is_asked_about_once_and_only_if_it_is_short(draw):
    rows = [row(number) for number in range(200)]
    train, validation = draw([*rows, row(300, context="c7"), row(301, context="x" * 451)])
    passages = [row["context"] for row in train + validation]
    assert sorted(passages) == sorted(f"c{number}" for number in range(200))
    assert len(validation) == 80


def test_no_article_of_validation_is_trained_on(draw):
    train, validation = draw([row(number, title=f"t{number % 40}") for number in range(400)])
    assert {row["subject"] for row in train}.isdisjoint(row["subject"] for row in validation)
    assert len(train) + len(validation) < 400


def test_the_order_is_random_and_always_the_same(draw):
    rows = [row(number) for number in range(200)]
    train, validation = draw(rows)
    assert draw(rows) == (train, validation)
    assert [row["id"] for row in validation] != [f"q{number}" for number in range(80)]


def test_what_is_written_can_be_trained_on(draw):
    _, validation = draw([row(1, question="When?", context="In 1905.", answers=["1905", "in 1905"])])
    (example,) = examples_of(validation[0], "here", "last")
    assert example.response == "1905"
    assert example.asked == "When?"
