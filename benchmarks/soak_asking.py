"""One request of a soak: asked in one of many ways, perhaps left, and compared with what must come back."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2
import openai
from openai import AsyncOpenAI
from soak_bad import Bad, fault
from soak_book import Book
from soak_questions import Answer, Question

PATIENCE = 180.0
"""Seconds after which an answer that has not ended is lost."""

SEEDS = 4
"""Of sampled answers: few, so that the same one is asked for again and again."""

Expected = Callable[[bool], Answer]
"""Whether the sharer was missing → the right answer."""


@dataclass
class Target:
    """The server, and all that its clients know."""

    url: str
    pair: str
    receiver: str
    """Ids of its models: the receiver with the sharer, and alone."""
    questions: Sequence[Question]
    bad: Sequence[Bad]
    book: Book
    degrades: bool
    """Whether it answers without a sharer that cannot be heard, instead of failing."""
    stopping: bool = False
    """Whether it has been told to stop."""
    sampled: dict[tuple[int, str, int], str] = field(default_factory=dict)
    """(question, model, seed) → the answer that came first, which all others must equal."""


class Asking:
    """One question on its way."""

    def __init__(self, target: Target, client: AsyncOpenAI, dice: random.Random, index: int, heard: bool):
        self._target, self._book, self._client, self._dice = target, target.book, client, dice
        self._index, self._question, self._heard = index, target.questions[index], heard
        self._model = target.pair if heard or dice.random() < 0.5 else target.receiver
        extra = {"sharers": []} if self._model == target.pair and not heard else None
        self._options: dict[str, Any] = {
            "model": self._model, "messages": self._question.messages, "max_tokens": self._question.limit,
            "temperature": 0, "extra_body": extra,
        }  # fmt: skip
        self._begun = self._book.now()

    async def act(self, action: str) -> str:
        """What came of it."""
        do = {
            "streamed": self._streamed, "whole": self._whole, "several": self._several, "stopped": self._stopped,
            "sampled": self._sampled, "read slowly": self._read_slowly, "left": self._left,
            "cancelled": self._cancelled,
        }[action]  # fmt: skip
        try:
            async with asyncio.timeout(PATIENCE):
                return await do()
        except openai.APIStatusError as error:
            return self._refused(action, error)
        except (openai.APIError, httpx2.HTTPError, TimeoutError) as error:
            return self._wrong(f"{action}: no answer but {type(error).__name__}: {error}")

    # --- ways of asking -------------------------------------------------------------------------------------------

    async def _whole(self) -> str:
        return self._compare(await self._create(), self._expected)

    async def _several(self) -> str:
        return self._compare(await self._create(n=2), self._expected, choices=2)

    async def _streamed(self) -> str:
        return await self._stream(0.0)

    async def _read_slowly(self) -> str:
        return await self._stream(0.2)

    async def _stream(self, pause: float) -> str:
        text, finish, tokens, missing = "", None, 0, False
        async with await self._create(stream=True, stream_options={"include_usage": True}) as stream:
            async for chunk in stream:
                missing = missing or _degraded(chunk)
                for choice in chunk.choices:
                    text, finish = text + (choice.delta.content or ""), choice.finish_reason or finish
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                await asyncio.sleep(pause * self._dice.random())
        return self._judge([(text, finish)], tokens, missing, self._expected)

    async def _stopped(self) -> str:
        """With a stop text that the answer is known to contain."""
        text = self._question.heard.text if self._heard else self._question.alone.text
        at = self._dice.randrange(max(1, len(text)))
        stop = text[at : at + self._dice.randint(1, 3)]
        if not stop or "\ufffd" in stop:  # half a character, which nobody can spell
            return await self._whole()

        def expected(missing: bool) -> Answer:
            answer = self._expected(missing)
            if stop not in answer.text:
                return answer
            return Answer(answer.text[: answer.text.index(stop)], 0, "stop")

        return self._compare(await self._create(stop=[stop]), expected)

    async def _sampled(self) -> str:
        """Nobody knows the answer, but with one seed it is always the same."""
        seed = self._dice.randrange(SEEDS)
        reply = await self._create(temperature=1, seed=seed)
        missing, text = _degraded(reply), reply.choices[0].message.content
        if missing:
            return self._unheard()
        model = self._model if self._heard else self._target.receiver
        first = self._target.sampled.setdefault((self._index, model, seed), text)
        return "right" if text == first else self._wrong(f"seed {seed} of {model}: {text!r} and before {first!r}")

    async def _left(self) -> str:
        """Close the stream after some pieces."""
        text, pieces, missing = "", self._dice.randint(1, 6), False
        async with await self._create(stream=True) as stream:
            async for chunk in stream:
                text, missing = text + (chunk.choices[0].delta.content or ""), missing or _degraded(chunk)
                pieces -= 1
                if not pieces:
                    break
        possible = self._expected(False), self._expected(True)
        if not any(answer.text.startswith(text) for answer in possible):
            return self._wrong(f"left: {text!r} begins none of {[answer.text for answer in possible]}")
        return self._unheard() if missing else "gone"

    async def _cancelled(self) -> str:
        """Go before the answer is there."""
        try:
            async with asyncio.timeout(self._dice.uniform(0, 0.5)):
                reply = await self._create()
        except TimeoutError:
            return "gone"
        return self._compare(reply, self._expected)

    async def _create(self, **more: Any) -> Any:
        return await self._client.chat.completions.create(**{**self._options, **more})

    # --- judging --------------------------------------------------------------------------------------------------

    def _expected(self, missing: bool) -> Answer:
        return self._question.heard if self._heard and not missing else self._question.alone

    def _compare(self, reply: Any, expected: Expected, choices: int = 1) -> str:
        got = [(choice.message.content, choice.finish_reason) for choice in reply.choices]
        if len(got) != choices:
            return self._wrong(f"{len(got)} answers instead of {choices}")
        return self._judge(got, reply.usage.completion_tokens, _degraded(reply), expected)

    def _judge(self, got: list[tuple[str, str | None]], tokens: int, missing: bool, expected: Expected) -> str:
        answer: Answer = expected(missing)
        for text, finish in got:
            if (text, finish) != (answer.text, answer.finish):
                return self._wrong(
                    f"{self._model}: {text!r} ({finish}) instead of {answer.text!r} ({answer.finish}) to "
                    f"{self._question.messages}"
                )
        if answer.tokens and tokens != answer.tokens * len(got):
            return self._wrong(f"{self._model}: {tokens} tokens instead of {len(got)} × {answer.tokens}")
        return self._unheard() if missing else "right"

    def _unheard(self) -> str:
        """An answer without the sharer, which says so."""
        if not (self._heard and self._target.degrades and self._book.unheard(self._begun)):
            return self._wrong(f"{self._model}: answered without a sharer that was there")
        return "right, unheard"

    def _refused(self, action: str, error: openai.APIStatusError) -> str:
        status, body = error.status_code, error.response.content
        if status == 429:
            wrong = fault(429, "busy", status, body)
            if not error.response.headers.get("retry-after", "").isdecimal():
                wrong = "a busy server that does not say when to come again"
            return self._wrong(wrong) if wrong else "busy"
        if status == 502 and self._heard and not self._target.degrades and self._book.unheard(self._begun):
            wrong = fault(502, "sharer_failed", status, body)
            return self._wrong(wrong) if wrong else "sharer failed"
        if status == 503 and self._target.stopping:
            wrong = fault(503, "stopping", status, body)
            return self._wrong(wrong) if wrong else "too late"
        return self._wrong(f"{action}, {self._model}: status {status}: {body[:300]!r}")

    def _wrong(self, what: str) -> str:
        self._book.violation(what)
        return "wrong"


def _degraded(reply: Any) -> bool:
    return bool((reply.model_extra or {}).get("c2c", {}).get("degraded"))
