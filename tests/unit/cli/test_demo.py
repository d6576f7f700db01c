from importlib.resources import files

from typer.testing import CliRunner

from cache2cache.cli import app
from cache2cache.evaluate.questions import read_questions
from cache2cache.models import pull


def test_every_question_is_answered_in_four_ways(asked, monkeypatch):
    pulled = []
    monkeypatch.setattr(pull, "pull", pulled.append)
    result = CliRunner().invoke(app, ["demo", "--limit", "1", "--message-tokens", "3"])
    assert result.exit_code == 0, result.output
    assert pulled == ["smollm2-135m", "qwen2.5-coder-1.5b"] == [asked["receiver"], *asked["sharers"]]
    assert asked["fusers"] == ["demo"]
    for words in ("receiver", "sharer", "text-to-text", "c2c", "totals", "1 asked in"):
        assert words in result.output
    assert result.output.count("ARC-E") == 1


def test_the_bundled_questions_come_from_four_test_sets_and_need_every_letter():
    rows = read_questions(str(files("cache2cache") / "data" / "demo_questions.jsonl"))
    assert len(rows) == 16
    assert {row.letter for row in rows} == set("ABCD")


def test_the_number_of_questions_is_checked():
    assert CliRunner().invoke(app, ["demo", "--limit", "17"]).exit_code == 2
