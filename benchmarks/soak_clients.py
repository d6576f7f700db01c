"""Clients of a soak: they ask one thing after the other, and send nonsense in between."""

from __future__ import annotations

import asyncio
import random

import httpx2
from openai import AsyncOpenAI
from soak_asking import PATIENCE, Asking, Target
from soak_bad import break_off, fault

ACTIONS = {
    "streamed": 25,
    "whole": 20,
    "several": 6,
    "stopped": 6,
    "sampled": 8,
    "read slowly": 4,
    "left": 12,
    "cancelled": 8,
    "bad": 8,
    "broken off": 3,
}
"""How often each is done, of 100."""


class Client:
    """One of many, each with a dice of its own."""

    def __init__(self, target: Target, seed: int):
        self._target, self._book, self._dice = target, target.book, random.Random(seed)
        self._openai = AsyncOpenAI(base_url=f"{target.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)
        self._raw = httpx2.AsyncClient(base_url=target.url, timeout=PATIENCE)

    async def run(self, end: float) -> None:
        """One request after the other until the end, in the book's time."""
        actions, weights = zip(*ACTIONS.items(), strict=True)
        async with self._openai, self._raw:
            while self._book.now() < end:
                await self.act(*self._dice.choices(actions, weights))

    async def act(self, action: str) -> None:
        """One request. Whatever comes of it goes into the book."""
        if action in ("bad", "broken off"):
            outcome = await (self._bad() if action == "bad" else self._break_off())
        else:
            index = self._dice.randrange(len(self._target.questions))
            heard = self._dice.random() < 0.75
            outcome = await Asking(self._target, self._openai, self._dice, index, heard).act(action)
        self._book.counts[action, outcome] += 1
        if outcome == "busy":
            await asyncio.sleep(self._dice.uniform(0.05, 0.5))

    async def _bad(self) -> str:
        bad = self._dice.choice(self._target.bad)
        try:
            reply = await self._raw.request(bad.method, bad.path, content=bad.body, headers=bad.headers)
        except httpx2.HTTPError as error:
            self._book.violation(f"{bad.name}: no answer but {type(error).__name__}: {error}")
            return "wrong"
        if bad.waits and reply.status_code == 429:
            return "busy"
        if wrong := fault(bad.status, bad.code, reply.status_code, reply.content):
            self._book.violation(f"{bad.name}: {wrong}")
            return "wrong"
        return "refused"

    async def _break_off(self) -> str:
        await break_off(httpx2.URL(self._target.url).port or 80, self._dice)
        return "gone"
