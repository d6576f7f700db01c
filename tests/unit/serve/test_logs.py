"""What is logged of a request, and what is not."""

from __future__ import annotations

import asyncio
import json
import logging
from typing import Any

import pytest

from cache2cache.errors import BusyError, ConversationError, SharerError
from cache2cache.serve.logs import JsonFormatter, RequestLog, request_id
from cache2cache.serve.presence import ClientGoneError

SECRET = "s3cr3t-token-value"


class Seen:
    """One request through the log: what the client got, what was logged and observed."""

    def __init__(self, app: Any, headers: list[tuple[bytes, bytes]] | None = None):
        self.sent: list[Any] = []
        self.observed: list[tuple[str, int]] = []
        self.raised: Exception | None = None
        scope = {
            "type": "http", "method": "POST", "path": "/v1/x", "query_string": SECRET.encode(),
            "headers": [*(headers or []), (b"authorization", f"Bearer {SECRET}".encode())],
        }  # fmt: skip

        async def receive() -> Any:
            return {"type": "http.request", "body": SECRET.encode(), "more_body": False}

        async def send(message: Any) -> None:
            self.sent.append(message)

        log = RequestLog(app, lambda route, status, _: self.observed.append((route, status)))
        try:
            asyncio.run(log(scope, receive, send))
        except Exception as error:
            self.raised = error

    @property
    def name(self) -> str:
        return dict(self.sent[0]["headers"])[b"x-request-id"].decode()


async def good(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": (request_id.get() or "").encode()})


def raising(error: Exception, *, midway: bool = False) -> Any:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        if midway:
            await good(scope, receive, send)
        raise error

    return app


@pytest.fixture
def lines(caplog):
    """What was logged, as the formatter writes it."""
    caplog.set_level(logging.INFO)
    return lambda: [json.loads(JsonFormatter().format(record)) for record in caplog.records]


def test_one_line_per_request_without_anything_secret(caplog, lines):
    seen = Seen(good)
    (line,) = lines()
    assert {key: line[key] for key in ("message", "method", "path", "status", "level")} == {
        "message": "request", "method": "POST", "path": "/v1/x", "status": 200, "level": "info",
    }  # fmt: skip
    assert line["bytes_sent"] == len(seen.name)
    assert SECRET not in json.dumps(line)
    assert SECRET not in caplog.text
    assert seen.observed == [("other", 200)]


@pytest.mark.parametrize(
    ("brought", "kept"),
    [(b"abc-1._Z", True), (b"x" * 64, True), (b"x" * 65, False), (b"", False), (b"a b", False), (b'{"a": 1}', False)],
)
def test_a_request_keeps_a_proper_id_and_gets_one_otherwise(brought, kept):
    seen = Seen(good, [(b"x-request-id", brought)])
    assert (seen.name == brought.decode()) is kept
    assert seen.sent[1]["body"].decode() == seen.name, "the app knows it as well"
    assert request_id.get() is None


def test_two_requests_have_two_ids():
    assert Seen(good).name != Seen(good).name


@pytest.mark.parametrize(
    ("error", "status", "traceback"),
    [
        (ConversationError("the conversation is empty"), 400, False),
        (BusyError("full", retry_after=2.5), 429, False),
        (SharerError("it is dead"), 502, True),
        (TimeoutError(), 504, True),
        (RuntimeError("inside"), 500, True),
    ],
)
def test_errors_become_responses_and_ours_leave_a_traceback(lines, error, status, traceback):
    seen = Seen(raising(error))
    assert (seen.raised, seen.sent[0]["status"]) == (None, status)
    body = json.loads(b"".join(m.get("body", b"") for m in seen.sent))["error"]
    assert set(body) == {"message", "type", "param", "code"}
    assert "inside" not in body["message"]
    assert any("traceback" in line for line in lines()) is traceback
    assert lines()[-1]["status"] == status
    if status == 429:
        assert dict(seen.sent[0]["headers"])[b"retry-after"] == b"3"


def test_an_error_in_the_middle_of_a_response_breaks_it_off(lines):
    seen = Seen(raising(RuntimeError("inside"), midway=True))
    assert isinstance(seen.raised, RuntimeError)
    assert [m.get("status") for m in seen.sent] == [200, None]
    assert "traceback" in lines()[0]


def test_a_client_that_left(lines):
    seen = Seen(raising(ClientGoneError()))
    assert (seen.raised, seen.sent, seen.observed) == (None, [], [("other", 499)])
    assert [line["status"] for line in lines()] == [499]


def test_lines_are_json_whatever_is_logged():
    record = logging.LogRecord("n", logging.WARNING, "", 0, 'line\nbreak "%s" 缓存', ("x",), None)
    record.fields = {"path": object(), "n": 1}
    text = JsonFormatter().format(record)
    assert "\n" not in text
    assert json.loads(text)["message"] == 'line\nbreak "x" 缓存'
    assert json.loads(text)["n"] == 1
