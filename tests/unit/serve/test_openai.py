"""Software that knows nothing of this package: the openai client and LangChain, against a real server."""

from __future__ import annotations

from typing import Any

import openai
import pytest
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from openai.types import CompletionUsage

from cache2cache.errors import (
    BusyError,
    ContextLengthError,
    ConversationError,
    RequestError,
    SharerError,
)
from cache2cache.serve.engine import Event, Request, TokenLogprob, Usage

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def engine(live: Any) -> Any:
    return live


@pytest.fixture(scope="module")
def shared_client(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


@pytest.fixture
def client(engine: Any, shared_client: openai.OpenAI) -> openai.OpenAI:
    """With an engine that knows nothing of the tests before."""
    return shared_client


def usage_of(usage: CompletionUsage | None) -> dict[str, Any]:
    assert usage is not None
    return usage.model_dump(exclude_none=True)


def test_a_chat(client: openai.OpenAI, engine: Any):
    answer = client.chat.completions.create(
        model="small+big+other", messages=HI, temperature=0.5, top_p=0.9, seed=3, stop=["END"], max_tokens=9
    )
    assert answer.object == "chat.completion"
    assert answer.model == "small+big+other"
    assert answer.choices[0].message.content == "Hello there"
    assert answer.choices[0].message.role == "assistant"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.choices[0].logprobs is None
    assert usage_of(answer.usage) == {
        "prompt_tokens": 7,
        "completion_tokens": 2,
        "total_tokens": 9,
        "prompt_tokens_details": {
            "cached_tokens": 2,
            "sharer_tokens": {"big": 11, "other": 13},
            "cache_bytes": 1024,
        },
    }
    assert answer.id.removeprefix("chatcmpl-") == answer._request_id
    (asked,) = engine.asked
    assert asked.prompt == HI
    assert asked.sharers == (0, 1)
    sampling = asked.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 3)
    assert (sampling.stop, sampling.max_tokens) == (("END",), 9)


def test_a_chat_in_pieces(client: openai.OpenAI, engine: Any):
    engine.script = lambda _: engine.said("Hel", "", "lo", "", finish="length")
    chunks = list(client.chat.completions.create(model="small+big+other", messages=HI, stream=True))
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["Hel", "lo", ""]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, "length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert all(chunk.usage is None for chunk in chunks)


def test_usage_comes_last(client: openai.OpenAI):
    stream = client.chat.completions.create(
        model="small+big+other", messages=HI, stream=True, stream_options={"include_usage": True}
    )
    *chunks, last = list(stream)
    whole = client.chat.completions.create(model="small+big+other", messages=HI)
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)
    assert (last.choices, last.usage) == ([], whole.usage)


def test_several_answers(client: openai.OpenAI, engine: Any):
    engine.script = lambda request: engine.said("seed ", str(request.sampling.seed))
    answer = client.chat.completions.create(model="small", messages=HI, n=3, seed=7)
    assert [choice.message.content for choice in answer.choices] == ["seed 7", "seed 8", "seed 9"]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert usage_of(answer.usage) | {"prompt_tokens_details": None} == {
        "prompt_tokens": 7,  # once, however many answers
        "completion_tokens": 6,
        "total_tokens": 13,
        "prompt_tokens_details": None,
    }


def test_several_answers_in_pieces(client: openai.OpenAI, engine: Any):
    engine.script = lambda request: engine.said("seed ", str(request.sampling.seed))
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(model="small", messages=HI, n=3, seed=7, stream=True):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == ["seed 7", "seed 8", "seed 9"]


def scored(request: Request) -> list[Event]:
    """Two tokens with their alternatives; the second is half of a character, and impossible."""
    yes, no = TokenLogprob(1, "é", -0.1), TokenLogprob(2, " no", -2.5)
    half = TokenLogprob(3, "\ufffd", float("-inf"))
    return [
        Event("é", (1,), yes, (yes, no), usage=Usage(1, (), 0, 0)),
        Event("", (3,), half, (no, half), finish="length"),
    ]


def test_logprobs_of_a_chat(client: openai.OpenAI, engine: Any):
    engine.script = scored
    answer = client.chat.completions.create(model="small", messages=HI, logprobs=True, top_logprobs=2)
    assert engine.asked[0].sampling.logprobs == 2
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    first, second = logprobs.content
    assert (first.token, first.logprob, first.bytes) == ("é", -0.1, [0xC3, 0xA9])
    assert [(top.token, top.logprob) for top in first.top_logprobs] == [("é", -0.1), (" no", -2.5)]
    assert (second.logprob, second.bytes) == (-9999.0, None)
    chunks = client.chat.completions.create(model="small", messages=HI, logprobs=True, top_logprobs=2, stream=True)
    pieces = [piece for chunk in chunks for piece in chunk.choices[0].logprobs.content]  # type: ignore[union-attr]
    assert pieces == logprobs.content


def test_logprobs_of_a_completion(client: openai.OpenAI, engine: Any):
    engine.script = scored
    answer = client.completions.create(model="small", prompt="Once", logprobs=2)
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.tokens == ["é", "\ufffd"]
    assert logprobs.token_logprobs == [-0.1, -9999.0]
    assert logprobs.top_logprobs == [{"é": -0.1, " no": -2.5}, {"\ufffd": -9999.0, " no": -2.5}]
    assert logprobs.text_offset == [0, 1]
    chunks = client.completions.create(model="small", prompt="Once", logprobs=2, stream=True)
    assert [chunk.choices[0].logprobs.text_offset for chunk in chunks] == [[0], [1]]  # type: ignore[union-attr]


def test_completions_of_several_prompts(client: openai.OpenAI, engine: Any):
    engine.script = lambda request: engine.said(request.prompt, "!")
    answer = client.completions.create(model="small+big+other", prompt=["a", "b"], n=2)
    assert answer.object == "text_completion"
    assert [(choice.index, choice.text) for choice in answer.choices] == [(0, "a!"), (1, "a!"), (2, "b!"), (3, "b!")]
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (14, 8)
    assert answer.usage.prompt_tokens_details.sharer_tokens == {"big": 22, "other": 26}  # type: ignore[union-attr]
    pieces: dict[int, str] = {}
    for chunk in client.completions.create(model="small", prompt=["a", "b"], stream=True):
        pieces[chunk.choices[0].index] = pieces.get(chunk.choices[0].index, "") + chunk.choices[0].text
    assert pieces == {0: "a!", 1: "b!"}


def test_models(client: openai.OpenAI, engine: Any):
    models = client.models.list().data
    assert [model.id for model in models] == ["small+big+other", "small", "big", "other"]
    assert models[0].c2c == {"answers": "small", "sharers": ["big", "other"], "fusers": []}  # type: ignore[attr-defined]
    assert client.models.retrieve("small+big+other") == models[0]
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4o")


@pytest.mark.parametrize(
    ("model", "extra", "sharers", "alone"),
    [
        ("small+big+other", {}, (0, 1), None),
        ("small+big+other", {"sharers": []}, (), None),
        ("small+big+other", {"sharers": ["other"]}, (1,), None),
        ("small+big+other", {"sharers": [0]}, (0,), None),
        ("small", {}, (), None),
        ("other", {}, (), 1),
    ],
)
def test_who_answers_and_who_speaks(
    client: openai.OpenAI, engine: Any, model: str, extra: dict, sharers: tuple, alone: int | None
):
    usage = Usage(1, (5,) * len(sharers), 0, 0)
    engine.script = lambda _: engine.said("Yes", usage=usage)
    answer = client.chat.completions.create(model=model, messages=HI, extra_body=extra)
    assert (engine.asked[0].sharers, engine.asked[0].alone) == (sharers, alone)
    heard = {("big", "other")[i]: 5 for i in sharers}
    assert answer.usage.prompt_tokens_details.sharer_tokens == heard  # type: ignore[union-attr]


def test_a_sharer_that_could_not_speak(client: openai.OpenAI, engine: Any):
    engine.script = lambda _: engine.said("Alone", " then", usage=Usage(7, (13,), 0, 9), degraded=(0,))
    raw = client.chat.completions.with_raw_response.create(model="small+big+other", messages=HI)
    answer = raw.parse()
    assert raw.headers["x-c2c-degraded"] == "big"
    assert answer.c2c == {"degraded": ["big"]}  # type: ignore[attr-defined]
    assert answer.usage.prompt_tokens_details.sharer_tokens == {"other": 13}  # type: ignore[union-attr]
    stream = client.chat.completions.create(model="small+big+other", messages=HI, stream=True)
    assert stream.response.headers["x-c2c-degraded"] == "big"
    first, *others = list(stream)
    assert first.c2c == {"degraded": ["big"]}  # type: ignore[attr-defined]
    assert not any(hasattr(chunk, "c2c") for chunk in others)


@pytest.mark.parametrize(
    ("error", "kind", "status", "code", "message"),
    [
        (RequestError("too long", field="stop"), openai.BadRequestError, 400, None, "too long"),
        (ConversationError("no user"), openai.BadRequestError, 400, None, "no user"),
        (ContextLengthError("over"), openai.BadRequestError, 400, "context_length_exceeded", "over"),
        (BusyError("full", retry_after=2.2), openai.RateLimitError, 429, "busy", "full"),
        (SharerError("it is dead"), openai.InternalServerError, 502, "sharer_failed", "it is dead"),
        (RuntimeError("secret"), openai.InternalServerError, 500, None, "log"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_errors_of_the_engine(
    client: openai.OpenAI, engine: Any, error: Exception, kind: type, status: int, code: str, message: str, stream: bool
):
    engine.script = lambda _: [error]
    with pytest.raises(kind, match=message) as refused:
        client.chat.completions.create(model="small", messages=HI, stream=stream)
    told: Any = refused.value
    assert (told.status_code, told.code) == (status, code)
    assert "secret" not in str(told)
    if isinstance(error, BusyError):
        assert told.response.headers["retry-after"] == "3"
    if isinstance(error, RequestError):
        assert told.param == "stop"


def test_an_error_after_the_first_pieces(client: openai.OpenAI, engine: Any, until: Any):
    begun = engine.said("Half", "")[:1]
    ends = {"0": [SharerError("it died")], "1": [engine.NEVER]}
    engine.script = lambda request: [*begun, engine.WAIT, *ends[request.id[-1]]]
    pieces = []
    with pytest.raises(openai.APIError, match="it died") as failed:
        for chunk in client.chat.completions.create(model="small+big+other", messages=HI, n=2, stream=True):
            pieces.append(chunk.choices[0].delta.content)
            if len(pieces) == 2:
                engine.go_on.set()
    assert pieces == ["Half", "Half"]
    assert failed.value.code == "sharer_failed"
    until(lambda: engine.cancelled == [engine.asked[1].id])


def test_an_engine_that_forgets_an_answer(client: openai.OpenAI, engine: Any):
    engine.script = lambda _: []
    with pytest.raises(openai.InternalServerError):
        client.chat.completions.create(model="small", messages=HI)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"frequency_penalty": 1.0}, "frequency_penalty"),
        ({"model": "gpt-4o"}, "model"),
        ({"n": 17}, "n"),
        ({"extra_body": {"sharers": ["nobody"]}}, "sharers"),
        ({"extra_body": {"top_k": 5}}, "top_k"),
    ],
)
def test_what_is_refused_has_a_name(client: openai.OpenAI, engine: Any, fields: dict[str, Any], param: str):
    with pytest.raises(openai.APIStatusError) as refused:
        client.chat.completions.create(**{"model": "small+big+other", "messages": HI, **fields})
    assert refused.value.param == param
    assert 400 <= refused.value.status_code < 500
    assert engine.asked == []


def test_a_client_that_leaves_cancels_its_answer(client: openai.OpenAI, engine: Any, until: Any):
    engine.script = lambda _: [engine.WAIT]
    with pytest.raises(openai.APITimeoutError):
        client.chat.completions.create(model="small", messages=HI, n=2, timeout=0.3)
    until(lambda: len(engine.cancelled) == 2)


def test_a_client_that_leaves_between_pieces_cancels_its_answer(client: openai.OpenAI, engine: Any, until: Any):
    engine.script = lambda _: [*engine.said("Once", " upon")[:1], engine.WAIT]
    stream = client.chat.completions.create(model="small", messages=HI, stream=True)
    assert next(iter(stream)).choices[0].delta.content == "Once"
    stream.close()
    until(lambda: engine.cancelled == [engine.asked[0].id])


@pytest.fixture
def model(engine: Any, address: str) -> ChatOpenAI:
    return ChatOpenAI(model="small+big+other", base_url=f"{address}/v1", api_key="unused", max_retries=0)  # type: ignore[arg-type]


def test_langchain(model: ChatOpenAI, engine: Any):
    asked = [SystemMessage("Be kind."), HumanMessage("Hi"), AIMessage("Hello"), HumanMessage("And?")]
    answer = model.invoke(asked)
    assert answer.content == "Hello there"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert answer.usage_metadata is not None
    assert (answer.usage_metadata["input_tokens"], answer.usage_metadata["output_tokens"]) == (7, 2)
    assert [message["role"] for message in engine.asked[0].prompt] == ["system", "user", "assistant", "user"]
    model.invoke([*asked, answer, HumanMessage("Again")])
    assert engine.asked[1].prompt[-2] == {"role": "assistant", "content": "Hello there"}


def test_langchain_in_pieces(model: ChatOpenAI):
    pieces = list(model.stream("Hi", stream_usage=True))
    assert "".join(str(piece.content) for piece in pieces) == "Hello there"
    assert [piece.usage_metadata["input_tokens"] for piece in pieces if piece.usage_metadata] == [7]
