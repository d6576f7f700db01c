"""From a request of the OpenAI API to its answers: who answers, as one document or as a stream of events."""

from __future__ import annotations

import asyncio
import json
import uuid
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

from starlette.requests import Request as HttpRequest
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from cache2cache.errors import RequestError
from cache2cache.serve.answering import answers
from cache2cache.serve.engine import Engine, Event, Request
from cache2cache.serve.faults import refusal
from cache2cache.serve.lifecycle import Lifecycle
from cache2cache.serve.logs import log, request_id
from cache2cache.serve.metrics import Metrics
from cache2cache.serve.presence import ClientGoneError, while_present
from cache2cache.serve.replies import ChatReply, Choice, CompletionReply, Reply
from cache2cache.serve.schemas import Asked, ChatRequest
from cache2cache.serve.settings import ServeSettings
from cache2cache.serve.ways import Ways

_LAST_WORDS = 2.0
"""Seconds beyond the deadline in which a slow reader can still take what there is."""

DEGRADED = "X-C2C-Degraded"
"""Header that names the sharers that should have spoken and could not."""

_Answers = AsyncGenerator[tuple[int, Event], None]


class Completions:
    """Answers requests with an engine."""

    def __init__(self, engine: Engine, ways: Ways, settings: ServeSettings, lifecycle: Lifecycle, metrics: Metrics):
        self._engine, self._ways, self._settings = engine, ways, settings
        self._lifecycle, self._metrics = lifecycle, metrics

    async def __call__(self, http: HttpRequest, asked: Asked) -> Response:
        """One answer to one request; whatever goes wrong becomes one as well."""
        try:
            return await self._answered(http, asked)
        except ClientGoneError:
            self._metrics.abandoned.inc()
            return Response(status_code=499)  # received by nobody but log and metrics
        except Exception as error:
            return self._refused(error)

    async def _answered(self, http: HttpRequest, asked: Asked) -> Response:
        begun = asyncio.get_running_loop().time()
        deadline = begun + self._settings.timeout
        name = request_id.get() or uuid.uuid4().hex
        requests = self._requests(asked, name)
        choices = [Choice(request) for request in requests]
        kind = ChatReply if isinstance(asked, ChatRequest) else CompletionReply
        reply = kind(name, asked.model, self._ways.sharers, choices, asked.n or 1)
        events = answers(self._engine, requests, deadline)
        try:
            # Before anything is sent, so that a request that cannot be answered gets a status that says so.
            await while_present(http, _next(events, choices))
            seconds = asyncio.get_running_loop().time() - begun
            self._metrics.first_token.labels(http.scope["route"].path).observe(seconds)
            if asked.stream:
                usage = asked.stream_options is not None and asked.stream_options.include_usage
                pieces = self._pieces(events, reply, include_usage=usage)
                return _EventStream(http, pieces, events, deadline + _LAST_WORDS, _headers(reply), self._metrics)
            await while_present(http, _rest(events, choices))
        except BaseException:
            await events.aclose()
            raise
        return JSONResponse(reply.whole(), headers=_headers(reply))

    def _requests(self, asked: Asked, name: str) -> list[Request]:
        """What the engine is asked, n requests per prompt.

        Raises:
            UnknownModelError, RequestError: see `Ways`; more answers than this server gives.
        """
        way = self._ways.find(asked.model)
        speaking = self._ways.speaking(way, asked.sharers)
        prompts, n = asked.prompts, asked.n or 1
        # More than may wait would be refused by the queue however often they are asked for.
        most = min(self._settings.max_choices, self._engine.max_waiting)
        if len(prompts) * n > most:
            raise RequestError(
                "more answers are asked for than this server gives to one request",
                got=len(prompts) * n, allowed=f"up to {most}", field="n",
            )  # fmt: skip
        each = [prompt for prompt in prompts for _ in range(n)]
        return [
            Request(f"{name}-{i}", prompt, speaking, way.alone, sampling)
            for i, (prompt, sampling) in enumerate(zip(each, asked.samplings(), strict=True))
        ]

    async def _pieces(self, events: _Answers, reply: Reply, *, include_usage: bool) -> AsyncGenerator[str, None]:
        """Server-sent events, one per piece, from answers of which the first event has arrived."""
        # With usage asked for, all pieces but the last say that it is still to come.
        more = {"usage": None} if include_usage else {}
        (begun,) = (i for i, choice in enumerate(reply.choices) if choice.events)
        try:
            if piece := reply.piece(begun):
                yield _event(piece | more)
            async for index, event in events:
                reply.choices[index].events.append(event)
                if piece := reply.piece(index):
                    yield _event(piece | more)
        except Exception as error:
            yield f"data: {bytes(self._refused(error).body).decode()}\n\n"
            return
        if include_usage:
            yield _event(reply.last())
        yield "data: [DONE]\n\n"

    def _refused(self, error: Exception) -> JSONResponse:
        response = refusal(error, ready=self._lifecycle.ready)
        if response.status_code == 500:
            log.error("a request failed", exc_info=error)
        return response


async def _next(events: _Answers, choices: Sequence[Choice]) -> None:
    index, event = await anext(events)
    choices[index].events.append(event)


async def _rest(events: _Answers, choices: Sequence[Choice]) -> None:
    async for index, event in events:
        choices[index].events.append(event)


def _headers(reply: Reply) -> dict[str, str]:
    missing = ", ".join(reply.degraded())
    return {DEGRADED: missing.encode("ascii", "backslashreplace").decode()} if missing else {}


def _event(data: dict[str, Any]) -> str:
    # In ASCII, since there are clients that take every line separator of Unicode for the end of a line.
    return f"data: {json.dumps(data, separators=(',', ':'))}\n\n"


class _EventStream(StreamingResponse):
    """Sends pieces until they end, the client leaves or a deadline has passed; then the answers are closed."""

    def __init__(
        self,
        http: HttpRequest,
        pieces: AsyncGenerator[str, None],
        answers: _Answers,
        deadline: float,
        headers: dict[str, str],
        metrics: Metrics,
    ):
        super().__init__(pieces, headers={**headers, "Cache-Control": "no-store"}, media_type="text/event-stream")
        self._http, self._pieces, self._answers = http, pieces, answers
        self._deadline, self._metrics = deadline, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        left = self._deadline - asyncio.get_running_loop().time()
        try:
            async with aclosing(self._answers), aclosing(self._pieces):
                await while_present(self._http, self.stream_response(send), left)
        except (ClientGoneError, TimeoutError):
            self._metrics.abandoned.inc()
