"""The server: OpenAI's routes over an engine, and those by which it is watched."""

from __future__ import annotations

import time
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from cache2cache import __version__
from cache2cache.serve.completions import Completions
from cache2cache.serve.engine import Engine
from cache2cache.serve.faults import refusal
from cache2cache.serve.lifecycle import Lifecycle
from cache2cache.serve.logs import RequestLog
from cache2cache.serve.metrics import Metrics
from cache2cache.serve.schemas import ChatRequest, CompletionRequest
from cache2cache.serve.security import Authentication, BodyLimit
from cache2cache.serve.settings import ServeSettings
from cache2cache.serve.ways import Way, Ways

OPEN_PATHS = ("/health", "/ready")
"""What anybody may ask for: it says nothing of what is asked here."""


def create_app(engine: Engine, settings: ServeSettings | None = None) -> FastAPI:
    """A server of an engine's answers, which starts and stops the engine.

    Its `state.lifecycle` is the `Lifecycle` to start before the server listens, and to drain before it stops.
    """
    settings = settings or ServeSettings()
    lifecycle, metrics = Lifecycle(engine, settings), Metrics(engine)
    ways = Ways(engine.receiver, engine.sharers, engine.alone)
    completions = Completions(engine, ways, settings, lifecycle, metrics)
    created = int(time.time())

    @asynccontextmanager
    async def lifespan(_: FastAPI):
        async with lifecycle.running():
            yield

    # The pages that show the schema would load scripts from elsewhere.
    app = FastAPI(title="cache2cache", version=__version__, docs_url=None, redoc_url=None, lifespan=lifespan)
    app.state.lifecycle = lifecycle
    # The one added last is met first.
    app.add_middleware(BodyLimit, max_bytes=settings.max_body_bytes)
    if settings.keys is not None:
        app.add_middleware(Authentication, keys=settings.keys, open_paths=OPEN_PATHS)
    app.add_middleware(RequestLog, observe=metrics.request)

    @app.exception_handler(RequestValidationError)
    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: Exception) -> Response:
        return refusal(error, ready=lifecycle.ready)

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(request: Request, asked: ChatRequest) -> Response:
        """Answer a conversation."""
        return await completions(request, asked)

    @app.post("/v1/completions", response_model=None)
    async def completion(request: Request, asked: CompletionRequest) -> Response:
        """Go on with texts."""
        return await completions(request, asked)

    def described(way: Way) -> dict[str, Any]:
        heard = [ways.sharers[i] for i in way.sharers]
        answers = ways.receiver if way.alone is None else ways.sharers[way.alone]
        about = {"answers": answers, "sharers": heard, "fusers": settings.fusers if heard else ()}
        return {"id": way.id, "object": "model", "created": created, "owned_by": "cache2cache", "c2c": about}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        """All ways of answering."""
        return {"object": "list", "data": [described(way) for way in ways]}

    @app.get("/v1/models/{model:path}", response_model=None)
    async def model(model: str) -> Response:
        """One way of answering."""
        try:
            return JSONResponse(described(ways.find(model)))
        except LookupError as error:
            return refusal(error, ready=lifecycle.ready)

    @app.get("/health", response_model=None)
    async def health() -> Response:
        """Whether the server is alive, and with it what answers."""
        return JSONResponse({"status": "ok"}) if lifecycle.alive else JSONResponse({"status": "dead"}, 503)

    @app.get("/ready", response_model=None)
    async def ready() -> Response:
        """Whether requests should be sent here."""
        return JSONResponse({"ready": lifecycle.ready}, 200 if lifecycle.ready else 503)

    @app.get("/metrics", response_model=None)
    async def measures() -> Response:
        """Prometheus' view."""
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app
