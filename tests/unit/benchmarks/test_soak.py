"""What a soak takes for a fault, and what it must notice."""

from __future__ import annotations

import asyncio
import json
import math
import random
from typing import Any

import pytest
import soak
from soak_asking import Asking, Target
from soak_bad import bad_requests, fault
from soak_book import AFTERMATH, Book, Outage
from soak_memory import Memory, Trend
from soak_questions import Answer, Question
from soak_watch import loads, log_faults

QUESTION = Question(
    [{"role": "user", "content": "hello"}], 5, Answer("it is the sharer", 5, "length"), Answer("it is me", 3, "stop")
)


# --- memory -------------------------------------------------------------------------------------------------------


def series(megabytes: list[float]) -> list[tuple[float, float]]:
    return [(30.0 * i, mb) for i, mb in enumerate(megabytes)]


def test_what_only_warms_up_does_not_grow():
    trend = Trend.of(series([100.0, 300.0, 450.0, 490.0, 500.0] + [500.0] * 15))
    assert trend is not None
    assert (trend.growth, trend.peak) == (0.0, 500.0)
    assert trend.slope == pytest.approx(0, abs=1e-9)


def test_a_leak_grows():
    trend = Trend.of(series([500.0 + 2 * i for i in range(40)]))
    assert trend is not None
    assert trend.slope == pytest.approx(4)
    assert trend.growth == pytest.approx(40)


def test_too_few_samples_say_nothing():
    assert Trend.of(series([1.0] * 10)) is None


def test_growth_is_a_violation_and_so_is_not_to_know():
    book = Book()
    soak.judge_memory({"server": Trend(100, 150, 150, 5), "sharer": Trend(100, 210, 210, 9)}, 64, book)
    assert len(book.violations) == 1
    assert "sharer" in book.violations[0]
    soak.judge_memory({"server": Trend(7500, 7700, 7700, 9)}, 64, book)
    assert len(book.violations) == 1, "less than 3 % of a large process"
    soak.judge_memory({"server": Trend(7500, 7800, 7800, 9)}, 64, book)
    assert len(book.violations) == 2
    soak.judge_memory({}, 64, empty := Book())
    assert "too short" in empty.violations[0]


def test_a_process_that_has_gone_is_no_sample():
    memory = Memory()
    memory.look("nobody", 2**22 + 1)
    assert not memory.samples


# --- the book -----------------------------------------------------------------------------------------------------


def test_a_request_may_fail_while_the_sharer_is_away_and_shortly_after():
    book = Book()
    assert book.heard
    assert not book.unheard(0.0)
    now = book.now()
    book.outages.append(Outage(now, math.inf))
    assert not book.heard
    assert book.unheard(now + 1)
    book.outages[0].ended = now
    assert book.heard
    assert book.unheard(now + AFTERMATH - 0.1)
    assert not book.unheard(now + AFTERMATH + 0.1)


def test_a_soak_that_met_nothing_proves_nothing():
    book = Book()
    book.counts["streamed", "right"] += 1
    book.require("right", "none")
    book.require("busy", "never full")
    assert [what.partition(": ")[2] for what in book.violations] == ["never full"]
    assert "| streamed | 1 |" in book.table()


# --- refusals -----------------------------------------------------------------------------------------------------

ERROR = {"message": "no", "type": "invalid_request_error", "param": None, "code": "busy"}


@pytest.mark.parametrize(
    ("status", "body", "right"),
    [
        (429, {"error": ERROR}, True),
        (400, {"error": ERROR}, False),
        (429, {"error": ERROR | {"code": None}}, False),
        (429, {"error": ERROR | {"message": ""}}, False),
        (429, {"error": {"message": "no"}}, False),
        (429, {"detail": "no"}, False),
        (429, "no", False),
        (429, None, False),
    ],
)
def test_a_refusal_has_its_status_and_openais_shape(status: int, body: Any, right: bool):
    assert (fault(429, "busy", status, json.dumps(body).encode()) is None) == right


def test_every_bad_request_is_bad_in_a_way_of_its_own():
    every = bad_requests("m", 24)
    assert len({bad.name for bad in every}) == len(every)
    assert len({(bad.method, bad.path, bad.body, tuple(bad.headers.items())) for bad in every}) == len(every)


# --- answers ------------------------------------------------------------------------------------------------------


class Server:
    """Says what a test tells it to say, in the place of OpenAI's client."""

    def __init__(self, text: str, finish: str, tokens: int, degraded: bool = False):
        self.chat = self.completions = self
        self._said = text, finish, tokens, degraded

    async def create(self, **options: Any) -> Any:
        from openai.types.chat import ChatCompletion

        text, finish, tokens, degraded = self._said
        choices = [
            {"index": i, "finish_reason": finish, "message": {"role": "assistant", "content": text}}
            for i in range(options.get("n", 1))
        ]
        usage = {"prompt_tokens": 1, "completion_tokens": tokens * len(choices), "total_tokens": 1}
        whole = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "choices": choices, "usage": usage}
        return ChatCompletion.model_validate(whole | ({"c2c": {"degraded": ["s"]}} if degraded else {}))


def outcome(
    server: Server, action: str = "whole", *, heard: bool = True, degrades: bool = False, outages: Any = ()
) -> tuple[str, list[str]]:
    book = Book(outages=list(outages))
    target = Target("", "pair", "receiver", [QUESTION], [], book, degrades)
    asking = Asking(target, server, random.Random(0), 0, heard)  # type: ignore[arg-type]
    return asyncio.run(asking.act(action)), book.violations


@pytest.mark.parametrize("action", ["whole", "several"])
def test_the_right_answer_is_right(action: str):
    assert outcome(Server("it is the sharer", "length", 5), action) == ("right", [])
    assert outcome(Server("it is me", "stop", 3), action, heard=False) == ("right", [])


@pytest.mark.parametrize(
    "server",
    [
        Server("it is me", "stop", 3),
        Server("it is the share", "length", 5),
        Server("it is the sharer", "stop", 5),
        Server("it is the sharer", "length", 4),
        Server("", "length", 5),
    ],
)
def test_every_other_answer_is_wrong(server: Server):
    found, violations = outcome(server)
    assert (found, len(violations)) == ("wrong", 1)


AWAY = (Outage(0.0),)


@pytest.mark.parametrize(
    ("degrades", "outages", "expected"),
    [(True, AWAY, "right, unheard"), (True, (), "wrong"), (False, AWAY, "wrong")],
)
def test_an_answer_without_the_sharer_is_right_only_while_it_is_away(degrades: bool, outages: Any, expected: str):
    server = Server("it is me", "stop", 3, degraded=True)
    assert outcome(server, degrades=degrades, outages=outages)[0] == expected


def test_a_seed_that_gives_two_answers_is_noticed():
    book = Book()
    target = Target("", "pair", "receiver", [QUESTION], [], book, False)

    def ask(text: str) -> str:
        asking = Asking(target, Server(text, "stop", 1), random.Random(0), 0, True)  # type: ignore[arg-type]
        return asyncio.run(asking.act("sampled"))

    assert [ask(text) for text in ("one", "one", "two")] == ["right", "right", "wrong"]


# --- what a server says of itself ---------------------------------------------------------------------------------


def test_loads_are_read_from_prometheus_text():
    text = '# HELP c2c_waiting x\nc2c_waiting 3.0\nc2c_running 2.0\nc2c_cache_bytes 1.5e+06\nc2c_x{a="b"} 1.0\n'
    assert loads(text) == {"c2c_waiting": 3.0, "c2c_running": 2.0, "c2c_cache_bytes": 1.5e6}
    with pytest.raises(KeyError):
        loads("c2c_waiting 3.0\n")


def test_errors_in_a_log_are_found(tmp_path):
    (tmp_path / "log").write_text(
        '{"level": "info", "message": "fine"}\n'
        "a warning of some library\n"
        '{"level": "error", "message": "a request failed", "traceback": "ValueError: x"}\n'
        "Traceback (most recent call last):\n"
    )
    found = list(log_faults(tmp_path / "log"))
    assert found == ["a request failed: ValueError: x", "Traceback (most recent call last):"]
