"""Logs as one JSON object per line, and requests that can be followed through them by an id.

Neither headers nor bodies nor query strings are logged: that is where secrets and conversations are.
"""

from __future__ import annotations

import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable
from contextvars import ContextVar
from datetime import UTC, datetime

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cache2cache.serve.presence import ClientGoneError
from cache2cache.serve.problems import problem_of

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""Of the request that is being answered."""

log = logging.getLogger("cache2cache.serve")

_HEADER = "X-Request-Id"
_ACCEPTED_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")

Observe = Callable[[str, int, float], None]
"""(route, status, seconds) of a request that is over. The route is the pattern that it matched, so that there are few;
`other` if it matched none."""


class JsonFormatter(logging.Formatter):
    """time, level, logger, message and request_id; then what was logged with `extra={"fields": {…}}`."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            "request_id": request_id.get(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["traceback"] = self.formatException(record.exc_info)
        return json.dumps(entry, ensure_ascii=False, default=str)


def to_stderr(level: int = logging.INFO) -> None:
    """Let everything that this process logs go to stderr as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(handlers=[handler], level=level, force=True)
    for chatty in ("httpx2", "httpcore2", "urllib3", "filelock"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


class RequestLog:
    """Gives each request an id, its own if it brings a proper one, and logs how it ended. The outermost middleware.

    An error that nothing else has turned into a response becomes one here, see `problem_of`; if it is our fault, its
    traceback is logged.
    """

    def __init__(self, app: ASGIApp, observe: Observe | None = None):
        self._app, self._observe = app, observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        brought = Headers(scope=scope).get(_HEADER, "")
        name = brought if _ACCEPTED_ID.fullmatch(brought) else uuid.uuid4().hex
        token, begun, status, sent = request_id.set(name), time.perf_counter(), 0, 0

        async def marked(message: Message) -> None:
            nonlocal status, sent
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)[_HEADER] = name
            sent += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, marked)
        except ClientGoneError:
            pass
        except Exception as error:
            response = problem_of(error)
            if status or response.status_code >= 500:
                log.exception("a request failed")
            if status:  # half of the response is on its way: all that is left is to break it off
                raise
            await response(scope, receive, marked)
        finally:
            seconds = time.perf_counter() - begun
            route = getattr(scope.get("route"), "path", "other")
            # 499, as nginx says it: nobody was there any more to be answered.
            ended = {"method": scope["method"], "path": scope["path"], "status": status or 499}
            log.info("request", extra={"fields": {**ended, "seconds": round(seconds, 4), "bytes_sent": sent}})
            if self._observe:
                self._observe(route, status or 499, seconds)
            request_id.reset(token)
