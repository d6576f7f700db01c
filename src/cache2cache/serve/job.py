"""A request on its way through the embedded engine, and its answer while it is written."""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from collections.abc import Collection
from dataclasses import dataclass, field

from transformers import DynamicCache, PreTrainedTokenizerBase

from cache2cache.errors import ModelError
from cache2cache.inputs import Row
from cache2cache.serve.engine import Event, Finish, Request, TokenLogprob, Usage
from cache2cache.serve.sampling import Draw, Drawn
from cache2cache.text.detokenise import Detokeniser, Speller


@dataclass(eq=False)
class Job:
    """A request that was accepted, and the way back to whoever asked.

    The event loop makes it, cancels it and receives; the worker does the rest.
    """

    request: Request
    loop: asyncio.AbstractEventLoop
    received: asyncio.Queue[Event | Exception] = field(default_factory=asyncio.Queue)
    cancelled: bool = False
    row: Row | None = None
    """What is read; None until the worker has tokenised the prompt."""
    limit: int = 0
    """Most tokens that are written; likewise."""

    def send(self, item: Event | Exception) -> None:
        """Hand over an event, or the error that ends the request."""
        try:
            self.loop.call_soon_threadsafe(self.received.put_nowait, item)
        except RuntimeError:  # the loop is closed, and with it whoever asked is gone
            self.cancelled = True

    @property
    def read(self) -> Row:
        assert self.row is not None, "tokenised before it is admitted"
        return self.row

    @property
    def positions(self) -> int:
        """Most positions of the cache that the answer is written from."""
        return len(self.read.ids) + self.limit - 1

    def sharer_positions(self, sharer: int) -> int:
        """Tokens that a sharer reads; 0 if it does not speak."""
        part = self.read.sharers[sharer]
        return 0 if part is None else len(part.ids)

    def prompt_key(self) -> str:
        """Equal for requests that read the same."""
        request = self.request
        asked = [request.alone, request.sharers, request.prompt]
        return hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()


class Answer:
    """One answer while it is written.

    Args:
        ends: tokens that end the turn of the model that writes.
        degraded: sharers that could not be heard.
    """

    def __init__(
        self,
        job: Job,
        tokenizer: PreTrainedTokenizerBase,
        ends: Collection[int],
        usage: Usage,
        degraded: tuple[int, ...] = (),
    ):
        self.job, self.draw = job, Draw(job.request.sampling)
        self.written: list[int] = []
        self.text = ""
        self.finish: Finish | None = None
        self.sharer_caches: list[DynamicCache] = []
        """What the sharers have read, for a prefix cache; empty without one."""
        self.usage, self.degraded, self.begun = usage, degraded, time.monotonic()
        self._ends = ends
        self._goes_on = isinstance(job.request.prompt, str)
        before = job.read.ids.tolist() if self._goes_on else ()
        self._detokeniser = Detokeniser(tokenizer, job.request.sampling.stop, before)
        self._speller = Speller(tokenizer)
        self._failed = False

    @property
    def done(self) -> bool:
        """Whether nothing is written any more."""
        return self.finish is not None or self._failed or self.job.cancelled

    @property
    def left(self) -> int:
        """Most tokens that are still written."""
        return self.job.limit - len(self.written)

    def fail(self, error: Exception) -> None:
        """End it with an error, unless it has ended."""
        if not self.done:
            self._failed = True
            self.job.send(error)

    def take(self, drawn: Drawn) -> None:
        """Add a token and send what is new."""
        if drawn.token is None:
            self.fail(ModelError("the model computed logits that are not numbers", hint="Load it in float32"))
            return
        first = not self.written
        self.written.append(drawn.token)
        text = self._detokeniser.add(drawn.token)
        ended = drawn.token in self._ends or self._detokeniser.stopped
        if ended or not self.left:
            text += self._detokeniser.end()
            self.finish = "stop" if ended or self._detokeniser.stopped else "length"
        self.text += text
        logprob = None if drawn.logprob is None else self._logprob(drawn.token, drawn.logprob)
        top = tuple(self._logprob(*one) for one in drawn.top)
        begins = (self.usage, self.degraded) if first else (None, ())
        self.job.send(Event(text, (drawn.token,), logprob, top, self.finish, *begins))

    def _logprob(self, token: int, logprob: float) -> TokenLogprob:
        first = len(self.written) == 1 and not self._goes_on
        return TokenLogprob(token, self._speller(token, first=first), logprob)
