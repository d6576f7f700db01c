"""Loads on a server: who asks when, and what is made of what they see."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Iterator

import pytest
import serve
from serve_load import Sample, Spread, Summary, answer, closed_loop


def test_percentiles_are_those_of_numpy():
    spread = Spread.of([4.0, 1.0, 3.0, 2.0])
    assert spread is not None
    assert (spread.mean, spread.p50) == (2.5, 2.5)
    assert (spread.p95, spread.p99) == pytest.approx((3.85, 3.97))
    assert Spread.of([]) is None


def test_a_summary_counts_what_was_written():
    found = Summary.of([Sample(0.0, 1.0, 3.0, 5), Sample(0.5, 2.5, 3.5, 3), Sample(1.0, 4.0, 4.0, 1)])
    assert (found.answers, found.seconds, found.tokens) == (3, 4.0, 9)
    assert (found.tokens_per_second, found.answers_per_second) == (9 / 4, 3 / 4)
    assert found.decode_rate == (4 + 2) / (2.0 + 1.0)
    assert found.first_token == Spread.of([1.0, 2.0, 3.0])
    assert found.token == Spread.of([2.0 / 4, 1.0 / 2])
    assert found.answer == Spread.of([3.0, 3.0, 3.0])


def test_answers_of_one_token_have_no_time_per_token():
    found = Summary.of([Sample(0.0, 1.0, 1.0, 1)])
    assert (found.decode_rate, found.token, found.tokens_per_second) == (None, None, 1.0)


@pytest.mark.parametrize(("concurrency", "answers"), [(1, 5), (3, 5), (4, 2)])
def test_clients_keep_busy_and_stop(concurrency: int, answers: int):
    asked: list[str] = []
    running = most = 0

    async def ask(prompt: str) -> Sample:
        nonlocal running, most
        asked.append(prompt)
        running += 1
        most = max(most, running)
        await asyncio.sleep(0)
        running -= 1
        return Sample(0.0, 0.0, 1.0, 1)

    prompts: Iterator[str] = map(str, itertools.count())
    samples = asyncio.run(closed_loop(ask, prompts, concurrency=concurrency, answers=answers, seconds=60))
    assert len(samples) == answers
    assert asked == [str(i) for i in range(answers)]
    assert most == min(concurrency, answers)


def test_no_time_no_answer():
    async def ask(prompt: str) -> Sample:
        raise AssertionError("asked too late")

    assert not asyncio.run(closed_loop(ask, iter("abc"), concurrency=2, answers=3, seconds=-1))


def test_no_two_prompts_are_the_same():
    prompts = list(itertools.islice(serve.different(), 100))
    assert len(set(prompts)) == 100
    assert len({prompt.split()[0] for prompt in prompts}) == 100


def test_the_report_compares(capsys: pytest.CaptureFixture[str]):
    def load(who: str, concurrency: int, tokens: float, rate: float | None) -> dict:
        summary = Summary.of([Sample(0.0, 1.0, 2.0, 3)]).json()
        return summary | {
            "who": who, "limit": 8, "concurrency": concurrency, "tokens_per_second": tokens, "decode_rate": rate,
        }  # fmt: skip

    serve.report(
        [load("pair", 1, 2.0, 10.0), load("pair", 8, 5.0, None), load("plain receiver", 1, 3.0, 8.0)],
    )
    lines = [[cell.strip() for cell in line.split("|")] for line in capsys.readouterr().out.splitlines()[2:]]
    assert [line[7] for line in lines] == ["1.00", "2.50", "1.00"]
    assert [line[-2] for line in lines] == ["1.25", "–", "1.00"]


def test_a_stream_is_timed_as_openai_sends_it():
    """With the client's own types, from chunks as a server sends them."""
    from openai.types.chat import ChatCompletionChunk

    head = {"id": "x", "object": "chat.completion.chunk", "created": 1, "model": "m"}

    def chunk(**choice: object) -> ChatCompletionChunk:
        choices = [{"index": 0, "finish_reason": None, "delta": {}, **choice}] if choice else []
        usage = None if choice else {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        return ChatCompletionChunk.model_validate(head | {"choices": choices, "usage": usage})

    class Fake:
        def __init__(self, *chunks: ChatCompletionChunk):
            self.chat = self.completions = self
            self._chunks = chunks

        async def create(self, **options: object):
            assert (options["stream"], options["temperature"], options["max_tokens"]) == (True, 0, 9)

            async def sent():
                for one in self._chunks:
                    await asyncio.sleep(0.01)
                    yield one

            return sent()

    role, text, end = chunk(delta={"role": "assistant", "content": ""}), chunk(delta={"content": "a"}), chunk(delta={})
    some = asyncio.run(answer(Fake(role, text, end, chunk()), "m", "hi", 9))  # type: ignore[arg-type]
    assert some.asked < some.first < some.last
    assert some.tokens == 7
    none = asyncio.run(answer(Fake(role, end, chunk()), "m", "hi", 9))  # type: ignore[arg-type]
    assert none.first == none.last
