"""What a client may ask for."""

import json
from typing import Any

import pytest
from fastapi.exceptions import RequestValidationError
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from cache2cache.serve.faults import refusal
from cache2cache.serve.schemas import ChatRequest, CompletionRequest

HI = [{"role": "user", "content": "Hi"}]


def chat(**fields: Any) -> ChatRequest:
    return ChatRequest.model_validate({"model": "m", "messages": HI, **fields})


def completion(**fields: Any) -> CompletionRequest:
    return CompletionRequest.model_validate({"model": "m", "prompt": "Once", **fields})


def fault(error: ValidationError) -> dict[str, Any]:
    """Message, param and code that a client gets."""
    located = [{**one, "loc": ("body", *one["loc"])} for one in error.errors()]
    return json.loads(bytes(refusal(RequestValidationError(located), ready=True).body))["error"]


def test_defaults_are_those_of_openai():
    (asked,) = chat().samplings()
    assert (asked.max_tokens, asked.temperature, asked.top_p, asked.stop, asked.logprobs) == (None, 1.0, 1.0, (), None)
    (asked,) = completion().samplings()
    assert asked.max_tokens == 16
    assert chat().samplings() != chat().samplings(), "without a seed, every answer is another draw"


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (chat(temperature=0), {"temperature": 0.0}),
        (chat(top_p=0.5), {"top_p": 0.5}),
        (chat(seed=-3), {"seed": -3}),
        (chat(stop="END"), {"stop": ("END",)}),
        (chat(stop=["a", "b"]), {"stop": ("a", "b")}),
        (chat(max_tokens=5), {"max_tokens": 5}),
        (chat(max_completion_tokens=6), {"max_tokens": 6}),
        (chat(max_tokens=6, max_completion_tokens=6), {"max_tokens": 6}),
        (chat(logprobs=True), {"logprobs": 0}),
        (chat(logprobs=True, top_logprobs=3), {"logprobs": 3}),
        (chat(logprobs=False), {"logprobs": None}),
        (completion(logprobs=0), {"logprobs": 0}),
        (completion(logprobs=4, max_tokens=2), {"logprobs": 4, "max_tokens": 2}),
    ],
)
def test_fields_reach_the_sampling(asked: ChatRequest | CompletionRequest, expected: dict[str, Any]):
    (sampling,) = asked.samplings()
    assert {name: getattr(sampling, name) for name in expected} == expected


def test_every_answer_has_the_next_seed():
    assert [s.seed for s in chat(n=3, seed=5).samplings()] == [5, 6, 7]
    assert [s.seed for s in completion(prompt=["a", "b"], n=2, seed=0).samplings()] == [0, 1, 2, 3]
    assert [s.seed for s in chat(n=2, seed=2**63 - 1).samplings()] == [2**63 - 1, -(2**63)], "seeds are 64 bits"


def test_null_is_as_good_as_nothing():
    optional = [name for name, field in ChatRequest.model_fields.items() if not field.is_required()]
    assert len(optional) > 10
    assert chat(**{**dict.fromkeys(optional), "seed": 1}).samplings() == chat(seed=1).samplings()


@pytest.mark.parametrize(
    "fields",
    [
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "tools": [], "tool_choice": "none"},
        {"response_format": {"type": "text"}, "user": None, "store": False, "service_tier": "auto"},
    ],
)
def test_what_asks_for_nothing_is_taken(fields: dict[str, Any]):
    assert chat(**fields, seed=1) == chat(seed=1)


def test_an_answer_can_be_sent_back_as_the_client_got_it():
    answer = {"role": "assistant", "content": "Yes", "refusal": None, "tool_calls": None, "annotations": []}
    assert chat(messages=[*HI, answer, *HI]).prompts[0][1] == {"role": "assistant", "content": "Yes"}


def test_parts_of_text_are_lines():
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    assert chat(messages=[{"role": "user", "content": parts}]).prompts == [[{"role": "user", "content": "one\ntwo"}]]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"frequency_penalty": 0.5}, "frequency_penalty", "unsupported_parameter"),
        ({"tools": [{"type": "function"}]}, "tools", "unsupported_parameter"),
        ({"response_format": {"type": "json_object"}}, "response_format", "unsupported_parameter"),
        ({"logit_bias": {"5": 1}}, "logit_bias", "unsupported_parameter"),
        ({"user": "me"}, "user", "unsupported_parameter"),
        ({"nonsense": None}, "nonsense", "unsupported_parameter"),
        ({"x" * 10_000: 1}, "x" * 80, "unsupported_parameter"),
        ({"\u00e9": 1}, "\\xe9", "unsupported_parameter"),
        ({"messages": None}, "messages", "invalid_value"),
        ({"messages": []}, "messages", "invalid_value"),
        ({"messages": "Hi"}, "messages", "invalid_value"),
        ({"messages": ["Hi"]}, "messages.0", "invalid_value"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "missing_required_parameter"),
        ({"messages": [{"role": "tool", "content": ""}]}, "messages.0.role", "invalid_value"),
        ({"messages": [{"role": "user", "content": None}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{**HI[0], "name": "me"}]}, "messages.0.name", "unsupported_parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": ["text"]}]}, "messages.0.content", "invalid_value"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages.0.content", "invalid_value"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": 1}]}]},
            "messages.0.content",
            "invalid_value",
        ),
        ({"model": 5}, "model", "invalid_value"),
        ({"model": "m" * 300}, "model", "invalid_value"),
        ({"n": 0}, "n", "invalid_value"),
        ({"n": 129}, "n", "invalid_value"),
        ({"n": "2"}, "n", "invalid_value"),
        ({"n": True}, "n", "invalid_value"),
        ({"n": 1.5}, "n", "invalid_value"),
        ({"max_tokens": 0}, "max_tokens", "invalid_value"),
        ({"max_completion_tokens": -1}, "max_completion_tokens", "invalid_value"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_completion_tokens", "invalid_value"),
        ({"temperature": -0.1}, "temperature", "invalid_value"),
        ({"temperature": 2.1}, "temperature", "invalid_value"),
        ({"temperature": float("nan")}, "temperature", "invalid_value"),
        ({"temperature": "hot"}, "temperature", "invalid_value"),
        ({"top_p": 0}, "top_p", "invalid_value"),
        ({"top_p": float("inf")}, "top_p", "invalid_value"),
        ({"seed": 2**63}, "seed", "invalid_value"),
        ({"seed": 10**300}, "seed", "invalid_value"),
        ({"stop": ""}, "stop.0", "invalid_value"),
        ({"stop": ["a"] * 17}, "stop", "invalid_value"),
        ({"stop": ["a" * 257]}, "stop.0", "invalid_value"),
        ({"stream": "yes"}, "stream", "invalid_value"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "invalid_value"),
        ({"stream": True, "stream_options": {"more": 1}}, "stream_options.more", "unsupported_parameter"),
        ({"top_logprobs": 2}, "top_logprobs", "invalid_value"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs", "invalid_value"),
        ({"logprobs": 2}, "logprobs", "invalid_value"),
        ({"sharers": "big"}, "sharers", "invalid_value"),
        ({"sharers": [None]}, "sharers.0", "invalid_value"),
        ({"sharers": [True]}, "sharers.0", "invalid_value"),
        ({"sharers": ["s" * 300]}, "sharers.0", "invalid_value"),
        ({"sharers": [0] * 65}, "sharers", "invalid_value"),
    ],
)
def test_what_a_chat_may_not_ask_for(fields: dict[str, Any], param: str, code: str):
    with pytest.raises(ValidationError) as refused:
        chat(**fields)
    told = fault(refused.value)
    assert (told["param"], told["code"], told["type"]) == (param, code, "invalid_request_error")
    assert param in told["message"]


@pytest.mark.parametrize(
    ("fields", "param", "code"),
    [
        ({"prompt": None}, "prompt", "invalid_value"),
        ({"prompt": []}, "prompt", "invalid_value"),
        ({"prompt": ""}, "prompt.0", "invalid_value"),
        ({"prompt": "\udfff"}, "prompt.0", "invalid_value"),
        ({"stop": "\ud800"}, "stop.0", "invalid_value"),
        ({"prompt": [1, 2, 3]}, "prompt.0", "invalid_value"),
        ({"echo": True}, "echo", "unsupported_parameter"),
        ({"best_of": 2}, "best_of", "unsupported_parameter"),
        ({"suffix": "end"}, "suffix", "unsupported_parameter"),
        ({"messages": HI}, "messages", "unsupported_parameter"),
        ({"logprobs": True}, "logprobs", "invalid_value"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unsupported_parameter"),
    ],
)
def test_what_a_completion_may_not_ask_for(fields: dict[str, Any], param: str, code: str):
    with pytest.raises(ValidationError) as refused:
        completion(**fields)
    told = fault(refused.value)
    assert (told["param"], told["code"]) == (param, code)


def test_what_was_said_is_not_repeated_in_a_fault():
    with pytest.raises(ValidationError) as refused:
        chat(messages=[{"role": "secret role", "content": "secret content"}], model=["secret model"])
    assert "secret" not in str(fault(refused.value))


_json = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
_names = st.sampled_from(sorted({*ChatRequest.model_fields, *ChatRequest.neutral, *CompletionRequest.model_fields}))


@given(st.dictionaries(_names | st.text(), _json, max_size=8) | _json)
def test_any_json_is_a_request_or_a_fault(body: Any):
    for kind in (ChatRequest, CompletionRequest):
        try:
            told = kind.model_validate(body).samplings()
        except ValidationError as refused:
            told = fault(refused)["message"]
        assert told
