import json
from typing import Any

import pytest
from typer.testing import CliRunner

from cache2cache import C2C
from cache2cache.cli import app, pair
from cache2cache.decoding import GREEDY

SHORT = ["--max-new-tokens", "6"]


def run(*args: str, **options: Any):
    return CliRunner().invoke(app, ["generate", *args, *SHORT], **options)


def test_defaults_are_the_demo_pair_and_greedy(asked: dict[str, Any], receiver, sharer, fuser):
    result = run("What is a cache?")
    assert result.exit_code == 0, result.output
    assert (asked["receiver"], asked["sharers"], asked["fusers"]) == ("smollm2-135m", ["qwen2.5-coder-1.5b"], ["demo"])
    assert asked["kwargs"] == {**GREEDY, "max_new_tokens": 6}
    expected = C2C(receiver, [sharer], [fuser]).generate(
        [{"role": "user", "content": "What is a cache?"}], max_new_tokens=6, do_sample=False
    )
    assert result.stdout == expected.text + "\n"
    assert "tiny-receiver ← tiny-sharer · read " in result.stderr
    assert "wrote 6" in result.stderr


def test_json_holds_text_tokens_counts_and_timings(asked: dict[str, Any]):
    result = run("hi", "--json", "--system", "Be brief.")
    answer = json.loads(result.stdout)
    assert result.stderr == ""
    assert answer["sharers"] == ["tiny-sharer"]
    assert len(answer["ids"]) == answer["counts"]["generated"] == 6
    assert len(answer["counts"]["sharer_prompt"]) == 1
    assert answer["timings"]["total"] == pytest.approx(
        sum(seconds for stage, seconds in answer["timings"].items() if stage != "total")
    )


def test_a_stream_is_the_same_text(asked: dict[str, Any]):
    assert run("hi", "--stream").stdout == run("hi").stdout


@pytest.mark.parametrize("args", [(), ("-",)])
def test_prompt_from_stdin(asked: dict[str, Any], args: tuple[str, ...]):
    assert run(*args, input="hi\n").stdout == run("hi").stdout


def test_receiver_alone(asked: dict[str, Any]):
    result = run("hi", "--no-sharer")
    assert (asked["sharers"], asked["fusers"]) == ([], [])
    assert "←" not in result.stderr


def test_another_pair(asked: dict[str, Any]):
    run("hi", "-r", "a", "-s", "b", "-s", "c", "-f", "x", "-f", "y", "--mode", "sequential", "--dtype", "float32")
    assert (asked["receiver"], asked["sharers"], asked["fusers"]) == ("a", ["b", "c"], ["x", "y"])
    assert (asked["mode"], asked["dtype"], asked["trust_remote_code"]) == ("sequential", "float32", False)


def test_no_timings(asked: dict[str, Any]):
    assert run("hi", "--no-timings").stderr == ""


def test_sampling_is_seeded(asked: dict[str, Any]):
    args = ("hi", "--temperature", "1.5", "--top-p", "0.9", "--seed")
    first, again, other = (run(*args, seed).stdout for seed in ("1", "1", "2"))
    assert first == again != other
    assert asked["kwargs"] == {
        **GREEDY, "do_sample": True, "temperature": 1.5, "top_p": 0.9, "top_k": 0, "max_new_tokens": 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("temperature", "top_p", "sampled"),
    [(None, None, False), (0.0, None, False), (0.7, None, True), (None, 0.9, True), (0.7, 0.9, True)],
)
def test_when_it_samples(temperature: float | None, top_p: float | None, sampled: bool):
    assert pair.generate_kwargs(None, temperature, top_p)["do_sample"] is sampled


def test_beams(asked: dict[str, Any]):
    assert run("hi", "--num-beams", "3").exit_code == 0
    assert asked["kwargs"]["num_beams"] == 3


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (("hi", "--stream", "--json"), "cannot go together"),
        (("hi", "--stream", "--num-beams", "2"), "cannot be streamed"),
        (("hi", "--no-sharer", "--fuser", "demo"), "--no-sharer"),
        (("hi", "--sharer", "other"), "needs one --fuser per sharer, got 0"),
        (("hi", "--receiver", "other"), "needs one --fuser per sharer, got 0"),
        (("hi", "--sharer", "a", "--sharer", "b", "--fuser", "x"), "got 1"),
        ((" ",), "empty"),
        (("hi", "--top-p", "2"), "--top-p"),
        (("hi", "--temperature", "0", "--top-p", "0.9"), "--top-p would do nothing"),
        (("hi", "--seed", "-1"), "--seed"),
        (("hi", "--seed", str(2**32)), "--seed"),
    ],
)
def test_contradictions_are_wrong_usage(asked: dict[str, Any], args: tuple[str, ...], said: str):
    result = run(*args)
    assert result.exit_code == 2
    assert said in result.stderr
    assert "receiver" not in asked, "nothing may be loaded for a command that cannot be carried out"


def test_unknown_device(asked: dict[str, Any]):
    result = run("hi", "--device", "abacus")
    assert result.exit_code == 4
    assert result.stderr.startswith("error: no device abacus here")
    assert len(result.stderr.splitlines()) == 1


def test_prompt_beyond_the_context(asked: dict[str, Any]):
    result = run("x" * 600)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1
