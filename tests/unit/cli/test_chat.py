from typing import Any

import pytest
from typer.testing import CliRunner

from cache2cache import C2C
from cache2cache.chat import Chat
from cache2cache.cli import app


def talk(*turns: str, args: tuple[str, ...] = ()):
    result = CliRunner().invoke(app, ["chat", "--max-new-tokens", "4", *args], input="\n".join(turns) + "\n")
    assert result.exit_code == 0, result.output
    return result


def test_turns_build_on_each_other(asked: dict[str, Any], receiver, sharer, fuser):
    chat = C2C(receiver, [sharer], [fuser]).chat("Be brief.")
    expected = [chat.send(text, max_new_tokens=4, do_sample=False).text for text in ("hello", "and then?")]
    assert talk("hello", "and then?", args=("--system", "Be brief.")).stdout == "".join(t + "\n" for t in expected)


def test_reset_forgets(asked: dict[str, Any]):
    assert talk("hello", "/reset", "hello").stdout == talk("hello").stdout * 2


def test_exit_leaves(asked: dict[str, Any]):
    assert talk("hello", "/exit", "more").stdout == talk("hello").stdout


def test_empty_lines_and_unknown_commands_are_no_turns(asked: dict[str, Any]):
    result = talk("", "/nonsense", "  ")
    assert result.stdout == ""
    assert "no command /nonsense" in result.stderr


def test_a_failing_turn_does_not_end_the_chat(asked: dict[str, Any]):
    result = talk("x" * 600, "hello")
    assert result.stderr.count("error: ") == 1
    assert result.stdout.endswith(talk("hello").stdout)


def test_interrupting_an_answer_goes_on_with_the_chat(asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch):
    real, calls = Chat.stream, []

    def stream(self: Chat, text: str, **kwargs: Any):
        calls.append(text)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return (yield from real(self, text, **kwargs))

    monkeypatch.setattr(Chat, "stream", stream)
    result = talk("first", "hello")
    assert "stopped" in result.stderr
    assert calls == ["first", "hello"]


def test_timings(asked: dict[str, Any]):
    assert talk("hello", args=("--timings",)).stderr.count("wrote 4") == 1
