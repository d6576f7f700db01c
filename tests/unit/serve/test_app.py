"""The server's routes, what they refuse, and by what they are watched."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.testclient import TestClient

from cache2cache.serve.app import create_app
from cache2cache.serve.keys import Keys
from cache2cache.serve.settings import ServeSettings

KEY = "a-key-that-nobody-guesses"
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"
BODY = {"model": "small", "messages": [{"role": "user", "content": "Hi"}]}


@pytest.fixture
def client(engine: Any) -> Any:
    with TestClient(create_app(engine)) as client:
        yield client


def pieces(response: httpx2.Response) -> list[Any]:
    """The events of a stream."""
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line]
    return [line if line == "[DONE]" else json.loads(line) for line in lines]


# --- bodies that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [CHAT, COMPLETION])
@pytest.mark.parametrize(
    ("body", "kind"),
    [
        (b"", "application/json"),
        (b"{", "application/json"),
        (b"[]", "application/json"),
        (b"null", "application/json"),
        (b'"text"', "application/json"),
        (b"\xff\xfe", "application/json"),
        (b'{"model": ' + b"[" * 100_000, "application/json"),
        (b'{"seed": ' + b"9" * 10_000 + b"}", "application/json"),
        (b'{"\\ud800": 1, "model": "small"}', "application/json"),
        (b'{"model": "\\ud800"}', "application/json"),
        # What a web page may send to another site without asking it first.
        (json.dumps(BODY).encode(), "text/plain"),
        (json.dumps(BODY).encode(), "application/x-www-form-urlencoded"),
        (json.dumps(BODY).encode(), None),
    ],
)
def test_a_body_that_is_no_request(client: TestClient, engine: Any, route: str, body: bytes, kind: str | None):
    refused = client.post(route, content=body, headers={} if kind is None else {"Content-Type": kind})
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["code"]
    assert engine.asked == []


def test_a_body_that_is_too_large(engine: Any):
    with TestClient(create_app(engine, ServeSettings(max_body_bytes=200))) as client:
        assert client.post(CHAT, json=BODY).status_code == 200
        large = json.dumps({**BODY, "stop": "x" * 200}).encode()
        chunks = (large[i : i + 10] for i in range(0, len(large), 10))
        for content in (large, chunks):
            refused = client.post(CHAT, content=content, headers={"Content-Type": "application/json"})  # type: ignore[arg-type]
            assert (refused.status_code, refused.json()["error"]["code"]) == (413, "request_too_large")
    assert len(engine.asked) == 1


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/v2", 404), ("GET", CHAT, 405), ("GET", "/docs", 404)])
def test_other_routes_are_refused_in_the_same_shape(client: TestClient, method: str, path: str, status: int):
    refused = client.request(method, path)
    assert refused.status_code == status
    assert refused.json()["error"].keys() == {"message", "type", "param", "code"}


# --- who may ask --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}, {"Authorization": f"Basic {KEY}"}])
@pytest.mark.parametrize("path", [CHAT, COMPLETION, "/v1/models", "/metrics", "/openapi.json"])
def test_nobody_is_answered_without_a_key(engine: Any, path: str, headers: dict[str, str]):
    with TestClient(create_app(engine, ServeSettings(keys=Keys([KEY])))) as client:
        refused = client.request("POST" if "completions" in path else "GET", path, headers=headers)
    assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")


def test_with_a_key_all_is_open(engine: Any):
    with TestClient(create_app(engine, ServeSettings(keys=Keys(["another-key-of-someone", KEY])))) as client:
        assert client.get("/health").status_code == 200
        assert client.get("/ready").status_code == 200
        client.headers["Authorization"] = f"Bearer {KEY}"
        assert client.post(CHAT, json=BODY).status_code == 200
        assert client.get("/metrics").status_code == 200


def test_neither_keys_nor_conversations_are_logged(engine: Any, caplog: pytest.LogCaptureFixture):
    engine.script = lambda _: [RuntimeError("broken")]
    body = {"model": "small", "messages": [{"role": "user", "content": "my secret"}]}
    caplog.set_level(logging.INFO, "cache2cache")
    with TestClient(create_app(engine, ServeSettings(keys=Keys([KEY])))) as client:
        for key in (KEY, "wrong-" + KEY):
            client.post(CHAT, json=body, headers={"Authorization": f"Bearer {key}"})
        client.post(CHAT, json={**body, "nonsense": "my secret"}, headers={"Authorization": f"Bearer {KEY}"})
    logged = "\n".join(f"{record.getMessage()} {vars(record)} {record.exc_text}" for record in caplog.records)
    assert "broken" in logged
    assert KEY not in logged
    assert "secret" not in logged
    assert KEY not in repr(ServeSettings(keys=Keys([KEY])))


# --- what comes back ----------------------------------------------------------------------------------------------


def test_a_request_keeps_its_id(client: TestClient, engine: Any):
    answer = client.post(CHAT, json=BODY, headers={"X-Request-Id": "mine-1"})
    assert answer.headers["x-request-id"] == "mine-1"
    assert answer.json()["id"] == "chatcmpl-mine-1"
    assert engine.asked[0].id == "mine-1-0"
    refused = client.post(CHAT, json={}, headers={"X-Request-Id": "mine-2"})
    assert refused.headers["x-request-id"] == "mine-2"


def test_events_are_one_line_each(client: TestClient, engine: Any):
    text = "a\nb\r\nc\u2028d\x85e “ü” 😀"
    engine.script = lambda _: engine.said(text)
    answer = client.post(CHAT, json={**BODY, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert len(answer.text.splitlines()) == 4  # two events, each with an empty line behind it
    piece, done = pieces(answer)
    assert (piece["choices"][0]["delta"]["content"], done) == (text, "[DONE]")
    assert client.post(CHAT, json=BODY).json()["choices"][0]["message"]["content"] == text


def test_a_request_that_takes_too_long(engine: Any, until: Callable[..., None]):
    engine.script = lambda _: [engine.NEVER]
    with TestClient(create_app(engine, ServeSettings(timeout=0.1))) as client:
        for body in (BODY, {**BODY, "stream": True}):
            refused = client.post(CHAT, json=body)
            assert (refused.status_code, refused.json()["error"]["code"]) == (504, "timeout")
        engine.script = lambda _: [*engine.said("Once", " upon")[:1], engine.NEVER]
        first, last = pieces(client.post(CHAT, json={**BODY, "stream": True}))
        assert first["choices"][0]["delta"]["content"] == "Once"
        assert last["error"]["code"] == "timeout", "and no [DONE]"
        until(lambda: len(engine.cancelled) == 3)


def test_one_failed_answer_cancels_the_others(client: TestClient, engine: Any, until: Callable[..., None]):
    engine.script = lambda request: [RuntimeError("broken")] if request.id.endswith("1") else [engine.NEVER]
    assert client.post(CHAT, json={**BODY, "n": 3}).status_code == 500
    until(lambda: len(engine.cancelled) == 2)


# --- by what it is watched ----------------------------------------------------------------------------------------


def measured(client: TestClient) -> dict[tuple[str, ...], float]:
    """(name, label values…) → value"""
    text = client.get("/metrics").text
    return {
        (sample.name, *sample.labels.values()): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_metrics(client: TestClient, engine: Any):
    client.post(CHAT, json=BODY)
    client.post(CHAT, json={**BODY, "stream": True})
    client.post(CHAT, json={})
    client.get("/v1/models/small")
    client.get("/made/up")
    values = measured(client)
    assert values["c2c_requests_total", CHAT, "200"] == 2
    assert values["c2c_requests_total", CHAT, "400"] == 1
    assert values["c2c_requests_total", "/v1/models/{model:path}", "200"] == 1
    assert not any("/made/up" in key for key in values), "anybody could make up any number of them"
    assert values["c2c_request_seconds_count", CHAT] == 3
    assert values["c2c_first_token_seconds_count", CHAT] == 2
    assert values["c2c_waiting",] == 4
    assert values["c2c_running",] == len(engine.asked)
    assert values["c2c_cache_bytes",] == 99
    assert values["c2c_stage_seconds_total", "decode"] == 1.5
    assert values["c2c_prefix_hits_total",] == 3


def test_two_servers_count_for_themselves(client: TestClient, engine: Any):
    client.post(CHAT, json=BODY)
    with TestClient(create_app(type(engine)())) as other:
        assert ("c2c_requests_total", CHAT, "200") not in measured(other)


def test_the_engine_lives_as_long_as_the_server(engine: Any):
    with TestClient(create_app(engine, ServeSettings(grace=7))) as client:
        assert engine.started
        assert client.get("/health").json() == {"status": "ok"}
        assert client.get("/ready").json() == {"ready": True}
        assert engine.stopped_with is None
    assert engine.stopped_with == 7


def test_a_server_whose_engine_has_died_says_so(client: TestClient, engine: Any):
    engine.alive = False
    assert (client.get("/health").status_code, client.get("/health").json()) == (503, {"status": "dead"})
    assert (client.get("/ready").status_code, client.get("/ready").json()) == (503, {"ready": False})


def test_a_stopping_server_is_unavailable_rather_than_busy(client: TestClient, engine: Any):
    lifecycle = client.app.state.lifecycle  # type: ignore[attr-defined]
    client.portal.call(lifecycle.drain)  # type: ignore[union-attr]
    assert (client.get("/ready").status_code, client.get("/health").status_code) == (503, 200)
    refused = client.post(CHAT, json=BODY)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "stopping")
    assert refused.headers["retry-after"] == "1"


@pytest.mark.parametrize(
    "wrong",
    [
        {"timeout": 0},
        {"timeout": float("inf")},
        {"grace": -1},
        {"notice": -1},
        {"max_choices": 0},
        {"max_body_bytes": 0},
        {"nonsense": 1},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ServeSettings(**wrong)
