"""A sharer as a service: prompts in, caches out. Knows neither receivers nor fusers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from fastapi import FastAPI, Request, Response

from cache2cache.errors import ContextLengthError, RequestError
from cache2cache.models.load import LanguageModel
from cache2cache.serve import wire
from cache2cache.serve.keys import Keys
from cache2cache.serve.logs import RequestLog
from cache2cache.serve.node_metrics import NodeMetrics
from cache2cache.serve.payload import SharerCache
from cache2cache.serve.prefiller import Prefiller, Wanted
from cache2cache.serve.presence import while_present
from cache2cache.serve.problems import problem
from cache2cache.serve.security import Authentication, BodyLimit
from cache2cache.serve.tokenizer_files import pack
from cache2cache.text.chat import render
from cache2cache.types import Message

OPEN_PATHS = ("/health", "/ready")


@dataclass(frozen=True)
class NodeSettings:
    """How a service is run.

    Raises:
        RequestError: a number that is not positive.
    """

    max_rows: int = 16
    """Prompts of a batch."""
    max_tokens: int = 16_384
    """Tokens of a batch, padding included."""
    max_waiting: int = 64
    """Requests that wait."""
    max_body_bytes: int = 4 << 20
    timeout: float = 60.0
    """Seconds from a request to its answer."""
    keys: Keys | None = field(default=None, repr=False)
    """Bearer tokens; None lets everybody in."""
    signing_key: bytes | None = field(default=None, repr=False)
    """Shared with those who ask, to sign with; None signs nothing."""

    def __post_init__(self) -> None:
        for name in ("max_rows", "max_tokens", "max_waiting", "max_body_bytes", "timeout"):
            if getattr(self, name) <= 0:
                raise RequestError(f"{name} must be positive", got=getattr(self, name))


def create_node(lm: LanguageModel, settings: NodeSettings | None = None) -> FastAPI:
    """The application. Its `state.lifecycle` starts and drains, see `Server`.

    Raises:
        ModelError: a tokenizer that cannot be sent.
    """
    settings = settings or NodeSettings()
    limits, metrics = wire.Limits(rows=settings.max_rows, tokens=settings.max_tokens), NodeMetrics()
    described = wire.Description(
        card=lm.card, dtype=str(lm.dtype).removeprefix("torch."), tokenizer=pack(lm.tokenizer), limits=limits  # type: ignore[arg-type]
    ).model_dump_json().encode()  # fmt: skip
    prefiller = Prefiller(lm, limits, settings.max_waiting, metrics.batch)
    parsing = ThreadPoolExecutor(1, "c2c-parsing")  # one thread, since tokenizers are not made for several

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await prefiller.start()
        yield
        await prefiller.stop()
        parsing.shutdown()

    app = FastAPI(title="c2c share", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.state.lifecycle = prefiller

    async def answer(body: bytes) -> bytes:
        loop = asyncio.get_running_loop()
        request = await loop.run_in_executor(parsing, wire.parse, wire.CacheRequest, body)
        prompts = await loop.run_in_executor(parsing, _prompts, lm, request, limits)
        positions = [_positions(prompt, ids) for prompt, ids in zip(request.prompts, prompts, strict=True)]
        caches = await prefiller.read(Wanted(prompts, positions, _layers(lm, request)))
        key = None if settings.signing_key is None else wire.request_key(settings.signing_key, body)
        with metrics.encode_seconds.time():
            payloads = await asyncio.to_thread(_payloads, caches, request, key)
        metrics.sent.inc(len(payloads))
        return payloads

    @app.post(wire.CACHE_PATH)
    async def cache(request: Request) -> Response:
        payloads = await while_present(request, answer(await request.body()), settings.timeout)
        return Response(payloads, media_type=wire.MEDIA_TYPE)

    @app.get(wire.SHARER_PATH)
    async def sharer() -> Response:
        key = settings.signing_key
        headers = None if key is None else {wire.SIGNATURE_HEADER: wire.signature(key, described)}
        return Response(described, media_type="application/json", headers=headers)

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/ready")
    async def ready() -> Response:
        if not prefiller.ready:
            return problem(503, "the sharer does not read", "server_error", code="not_ready")
        return Response('{"status":"ready"}', media_type="application/json")

    @app.get("/metrics")
    async def show_metrics() -> Response:
        metrics.waiting.set(prefiller.waiting)
        metrics.running.set(prefiller.running)
        return Response(metrics.text(), media_type="text/plain; version=0.0.4")

    @app.exception_handler(404)
    @app.exception_handler(405)
    async def no_such_route(request: Request, error: Exception) -> Response:
        return problem(getattr(error, "status_code", 404), f"no {request.method} {request.url.path} here")

    # The one added last is met first.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes, seconds=settings.timeout)
    if settings.keys is not None:
        app.add_middleware(Authentication, keys=settings.keys, open_paths=OPEN_PATHS)
    app.add_middleware(RequestLog, observe=metrics.request)
    return app


def _prompts(lm: LanguageModel, request: wire.CacheRequest, limits: wire.Limits) -> list[np.ndarray]:
    """Token ids of every prompt, which the model can read."""
    if len(request.prompts) > limits.rows:
        raise RequestError("too many prompts", got=len(request.prompts), allowed=f"up to {limits.rows}")
    prompts = [_ids(lm, prompt) for prompt in request.prompts]
    width = max(map(len, prompts))
    longest, vocabulary = lm.card.geometry.max_positions, len(lm.model.get_input_embeddings().weight)  # type: ignore[arg-type]
    if longest is not None and width > longest:
        raise ContextLengthError(f"a prompt does not fit into the context of {lm.card.id}", got=width, allowed=longest)
    if width * len(prompts) > limits.tokens:
        raise RequestError(
            "the prompts are too long together", got=f"{len(prompts)} × {width} tokens", allowed=limits.tokens
        )
    for i, ids in enumerate(prompts):
        if not len(ids) or ids.min() < 0 or ids.max() >= vocabulary:
            raise RequestError(f"prompts.{i} has token ids that the model does not have", allowed=f"0–{vocabulary - 1}")
    return prompts


def _ids(lm: LanguageModel, prompt: wire.Prompt) -> np.ndarray:
    if prompt.messages is None:
        try:
            return np.array(prompt.ids, dtype=np.int64)
        except OverflowError as error:
            raise RequestError("a token id is no 64-bit number") from error
    messages = [Message(role=turn.role, content=turn.content) for turn in prompt.messages]
    return render(lm.tokenizer, messages, template=prompt.template).ids


def _positions(prompt: wire.Prompt, ids: np.ndarray) -> Sequence[int]:
    return _ascending("positions", range(len(ids)) if prompt.positions is None else prompt.positions, len(ids))


def _layers(lm: LanguageModel, request: wire.CacheRequest) -> tuple[int, ...]:
    layers = lm.card.geometry.layers
    return tuple(_ascending("layers", range(layers) if request.layers is None else request.layers, layers))


def _ascending(name: str, numbers: Sequence[int], size: int) -> Sequence[int]:
    if not all(a < b for a, b in pairwise((-1, *numbers, size))):
        raise RequestError(f"{name} must ascend", allowed=f"0–{size - 1}, each once")
    return numbers


def _payloads(caches: Sequence[SharerCache], request: wire.CacheRequest, key: bytes | None) -> bytes:
    options = {"precision": request.precision, "compress": request.compress, "key": key}
    return wire.join(cache.to_bytes(**options) for cache in caches)
