"""A sharer as a service, seen by whoever speaks HTTP."""

from __future__ import annotations

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
import torch

from cache2cache.errors import ModelError, RequestError
from cache2cache.serve import wire
from cache2cache.serve.keys import Keys
from cache2cache.serve.node import NodeSettings, create_node
from cache2cache.serve.payload import SharerCache
from cache2cache.testing import tiny_model
from cache2cache.text.chat import render

TOKEN = "t" * 20
MAX_BYTES = 1 << 22
MESSAGES = [{"role": "user", "content": "what color is the answer?"}]


def post(address: str, body: object, **options) -> httpx2.Response:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return httpx2.post(address + wire.CACHE_PATH, content=content, **options)


def caches(response: httpx2.Response, count: int) -> list[SharerCache]:
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == wire.MEDIA_TYPE
    return [SharerCache.from_bytes(bytes(p), max_bytes=MAX_BYTES) for p in wire.split(response.content, count)]


def test_messages_and_their_token_ids_are_the_same_prompt(sharer, node):
    for template in (None, "plain", "completion"):
        ids = render(sharer.tokenizer, MESSAGES, template=template).ids.tolist()
        (read,) = caches(post(node.address, {"prompts": [{"messages": MESSAGES, "template": template}]}), 1)
        (same,) = caches(post(node.address, {"prompts": [{"ids": ids}]}), 1)
        read.matches(sharer.card, ids)
        assert torch.equal(read.kv, same.kv)
        assert read.positions.tolist() == list(range(len(ids)))
        assert read.layers == tuple(range(sharer.card.geometry.layers))


def test_what_is_asked_for_is_what_comes(node):
    prompts = [{"ids": [5, 6, 7, 8], "positions": [1, 3]}, {"ids": [9], "positions": [0]}]
    first, second = caches(post(node.address, {"prompts": prompts, "layers": [0, 2], "compress": True}), 2)
    (whole,) = caches(post(node.address, {"prompts": [{"ids": [5, 6, 7, 8]}]}), 1)
    assert (first.positions.tolist(), first.layers, second.positions.tolist()) == ([1, 3], (0, 2), [0])
    torch.testing.assert_close(first.kv, whole.kv[:, [0, 2]][:, :, :, [1, 3]])


BAD = {
    "not JSON": b"{",
    "nothing": b"",
    "not UTF-8": b'{"prompts": "\xff"}',
    "no prompts": {},
    "an empty list": {"prompts": []},
    "neither ids nor messages": {"prompts": [{}]},
    "ids and messages": {"prompts": [{"ids": [1], "messages": MESSAGES}]},
    "no ids": {"prompts": [{"ids": []}]},
    "text as ids": {"prompts": [{"ids": "abc"}]},
    "fractions as ids": {"prompts": [{"ids": [1.5]}]},
    "truth as ids": {"prompts": [{"ids": [True]}]},
    "a negative id": {"prompts": [{"ids": [-1]}]},
    "an id beyond the vocabulary": {"prompts": [{"ids": [100_000]}]},
    "an id beyond 64 bits": {"prompts": [{"ids": [1 << 70]}]},
    "no messages": {"prompts": [{"messages": []}]},
    "an unknown role": {"prompts": [{"messages": [{"role": "tool", "content": "x"}]}]},
    "content that is no text": {"prompts": [{"messages": [{"role": "user", "content": [1]}]}]},
    "a template that is a program": {"prompts": [{"messages": MESSAGES, "template": "{{ 1 }}"}]},
    "a template for ids": {"prompts": [{"ids": [1], "template": "plain"}]},
    "no positions": {"prompts": [{"ids": [1], "positions": []}]},
    "a position outside": {"prompts": [{"ids": [1, 2], "positions": [2]}]},
    "a position before": {"prompts": [{"ids": [1, 2], "positions": [-1]}]},
    "positions that fall": {"prompts": [{"ids": [1, 2], "positions": [1, 0]}]},
    "positions twice": {"prompts": [{"ids": [1, 2], "positions": [1, 1]}]},
    "a layer too deep": {"prompts": [{"ids": [1]}], "layers": [3]},
    "layers that fall": {"prompts": [{"ids": [1]}], "layers": [1, 0]},
    "an unknown precision": {"prompts": [{"ids": [1]}], "precision": "int2"},
    "an unknown field": {"prompts": [{"ids": [1]}], "trust_remote_code": True},
    "too many prompts": {"prompts": [{"ids": [1]}] * 17},
    "a prompt beyond the context": {"prompts": [{"ids": [1] * 513}]},
}


@pytest.mark.parametrize("body", BAD.values(), ids=BAD)
def test_bad_requests_are_refused_in_words(node, body):
    response = post(node.address, body)
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert error["message"]
    # A context that is too short has a code of its own, which OpenAI's clients know.
    assert (error["code"] == "context_length_exceeded") == (body == BAD["a prompt beyond the context"])


def test_after_bad_requests_good_ones_are_answered(node):
    caches(post(node.address, {"prompts": [{"ids": [1, 2]}]}), 1)


def test_a_conversation_that_is_refused_is_not_repeated(node):
    response = post(node.address, {"prompts": [{"messages": [{"role": "user", "content": 5, "x": "my secret"}]}]})
    assert "my secret" not in response.text


def test_too_many_tokens_together(sharer, running):
    with running(sharer, NodeSettings(max_tokens=20)) as node:
        assert post(node.address, {"prompts": [{"ids": [1] * 10}, {"ids": [1]}]}).status_code == 200
        response = post(node.address, {"prompts": [{"ids": [1] * 11}, {"ids": [1]}]})
        assert (response.status_code, "2 × 11 tokens" in response.json()["error"]["message"]) == (400, True)


def test_bodies_are_bounded(sharer, running):
    with running(sharer, NodeSettings(max_body_bytes=100)) as node:
        chunks = [b" " * 60] * 3
        for content in (b" " * 101, (c for c in chunks)):
            response = httpx2.post(node.address + wire.CACHE_PATH, content=content)
            assert response.status_code == 413


def test_who_may_ask_for_what(sharer, running):
    with running(sharer, NodeSettings(keys=Keys([TOKEN]))) as node:
        for path in ("/health", "/ready"):
            assert httpx2.get(node.address + path).status_code == 200
        for path in ("/metrics", wire.SHARER_PATH, "/nowhere"):
            refused = httpx2.get(node.address + path)
            assert refused.status_code == 401
            assert refused.json()["error"]["code"] == "invalid_api_key"
        auth = {"Authorization": f"Bearer {TOKEN}"}
        assert httpx2.get(node.address + wire.SHARER_PATH, headers=auth).status_code == 200
        assert post(node.address, {"prompts": [{"ids": [1]}]}).status_code == 401
        caches(post(node.address, {"prompts": [{"ids": [1]}]}, headers=auth), 1)


def test_other_paths_and_methods(node):
    for method, path, status in (("GET", "/docs", 404), ("GET", "/openapi.json", 404), ("DELETE", "/health", 405)):
        response = httpx2.request(method, node.address + path)
        assert response.status_code == status
        assert path in response.json()["error"]["message"]


def test_request_ids_come_back(node):
    assert httpx2.get(node.address + "/health", headers={"X-Request-Id": "mine-1"}).headers["x-request-id"] == "mine-1"


def test_metrics(sharer, running):
    with running(sharer) as node:
        sent = len(post(node.address, {"prompts": [{"ids": [1, 2, 3]}, {"ids": [4]}]}).content)
        post(node.address, {})
        httpx2.get(node.address + "/nowhere")
        lines = httpx2.get(node.address + "/metrics").text.splitlines()
    for line in (
        'c2c_share_requests_total{route="/v1/cache",status="200"} 1.0',
        'c2c_share_requests_total{route="/v1/cache",status="400"} 1.0',
        'c2c_share_requests_total{route="other",status="404"} 1.0',
        "c2c_share_tokens_total 4.0",
        "c2c_share_batch_rows_sum 2.0",
        f"c2c_share_payload_bytes_total {float(sent)}",
        "c2c_share_waiting 0.0",
        "c2c_share_running 0.0",
    ):
        assert line in lines


def test_everybody_gets_what_they_would_get_alone(node):
    prompts = [[5 + i] * (1 + 7 * i % 40) + [3, i] for i in range(24)]

    def ask(ids: list[int]) -> SharerCache:
        return caches(post(node.address, {"prompts": [{"ids": ids}]}, timeout=60), 1)[0]

    alone = [ask(ids) for ids in prompts]
    with ThreadPoolExecutor(12) as crowd:
        together = list(crowd.map(ask, prompts))
    for a, b in zip(alone, together, strict=True):
        assert a.ids_digest == b.ids_digest
        torch.testing.assert_close(a.kv, b.kv, rtol=1e-4, atol=1e-4)


def test_a_request_that_takes_too_long(monkeypatch, sharer, running):
    async def never(self, wanted):
        await asyncio.Future()

    monkeypatch.setattr("cache2cache.serve.prefiller.Prefiller.read", never)
    with running(sharer, NodeSettings(timeout=0.1)) as node:
        response = post(node.address, {"prompts": [{"ids": [1]}]})
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")


def test_what_goes_wrong_inside_is_not_told(monkeypatch, caplog, sharer, running):
    async def broken(self, wanted):
        raise RuntimeError("an internal secret")

    monkeypatch.setattr("cache2cache.serve.prefiller.Prefiller.read", broken)
    with running(sharer) as node:
        response = post(node.address, {"prompts": [{"ids": [1]}]})
    assert (response.status_code, response.json()["error"]["type"]) == (500, "server_error")
    assert "secret" not in response.text
    assert "an internal secret" in caplog.text


def test_a_full_queue_and_one_that_drains(monkeypatch, sharer, running):
    with running(sharer) as node:
        node.state.lifecycle._max_waiting = 0
        response = post(node.address, {"prompts": [{"ids": [1]}]})
        assert (response.status_code, response.json()["error"]["code"]) == (429, "busy")
        assert int(response.headers["retry-after"]) >= 1
        node.state.lifecycle._draining = True
        assert httpx2.get(node.address + "/ready").status_code == 503
        assert httpx2.get(node.address + "/health").status_code == 200


def test_the_description(sharer, node):
    response = httpx2.get(node.address + wire.SHARER_PATH)
    described = wire.parse(wire.Description, response.content)
    assert described.card == sharer.card
    assert described.dtype == "float32"
    assert set(described.tokenizer) >= {"tokenizer.json", "tokenizer_config.json"}
    assert wire.SIGNATURE_HEADER not in response.headers


@pytest.mark.parametrize("field", ["max_rows", "max_tokens", "max_waiting", "max_body_bytes", "timeout"])
def test_settings_out_of_range(field):
    with pytest.raises(RequestError, match=f"{field} must be positive"):
        NodeSettings(**{field: 0})


def test_a_tokenizer_that_changes_on_its_way_is_noticed_at_the_start(monkeypatch):
    lm = tiny_model("qwen3")
    monkeypatch.setattr("cache2cache.serve.tokenizer_files.TOKENIZER_FILES", ("tokenizer_config.json",))
    with pytest.raises(ModelError, match="tokenizer"):
        create_node(lm)
