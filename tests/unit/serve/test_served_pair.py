"""A tiny pair behind the API: clients get what the pair says without a server."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

import openai
import pytest
import torch
from langchain_openai import ChatOpenAI

from cache2cache import C2C
from cache2cache.fuser.base import Fuser
from cache2cache.models.load import LanguageModel
from cache2cache.serve.admission import Limits
from cache2cache.serve.embedded import TransformersEngine
from cache2cache.testing import tiny_model
from cache2cache.types import Message

MODEL = "tiny-receiver+tiny-sharer"
CONVERSATIONS: list[list[Message]] = [
    [{"role": "user", "content": "What is the answer?"}],
    [{"role": "system", "content": "Be short."}, {"role": "user", "content": "the question and the letter"}],
    [
        {"role": "user", "content": "12 == 12"},
        {"role": "assistant", "content": "and"},
        {"role": "user", "content": "color?"},
    ],
]


@pytest.fixture(scope="module")
def answering(receiver: LanguageModel, sharer: LanguageModel, fuser: Fuser) -> C2C:
    return C2C(receiver, [sharer], [fuser])


@pytest.fixture
def client(answering: C2C, served: Any) -> Iterator[openai.OpenAI]:
    with served(TransformersEngine(answering, Limits(max_batch=4, max_waiting=8, max_new_tokens=32))) as address:
        yield openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)


def greedy(answering: C2C, conversation: list[Message], sharers: list[int] | None = None) -> str:
    answer = answering.generate(conversation, sharers=sharers, max_new_tokens=12, do_sample=False)
    return answer.text  # type: ignore[union-attr]


def test_the_pair_says_what_it_says_without_a_server(client: openai.OpenAI, answering: C2C):
    options: dict[str, Any] = {"temperature": 0, "max_tokens": 12}

    def ask(number: int) -> tuple[str, str]:
        conversation: Any = CONVERSATIONS[number % 3]
        whole = client.chat.completions.create(model=MODEL, messages=conversation, **options)
        stream = client.chat.completions.create(model=MODEL, messages=conversation, stream=True, **options)
        return whole.choices[0].message.content or "", "".join(c.choices[0].delta.content or "" for c in stream)

    expected = [greedy(answering, conversation) for conversation in CONVERSATIONS]
    assert len(set(expected)) == 3
    with ThreadPoolExecutor(6) as several:
        assert list(several.map(ask, range(6))) == [(expected[i % 3],) * 2 for i in range(6)]


def test_who_speaks_changes_what_is_said(client: openai.OpenAI, answering: C2C, sharer: LanguageModel):
    conversation: Any = CONVERSATIONS[0]

    def ask(model: str, **extra: Any) -> Any:
        return client.chat.completions.create(
            model=model, messages=conversation, temperature=0, max_tokens=12, extra_body=extra
        )

    alone = greedy(answering, conversation, [])
    assert alone != greedy(answering, conversation)
    assert ask("tiny-receiver").choices[0].message.content == alone
    assert ask(MODEL, sharers=[]).choices[0].message.content == alone
    by_itself = C2C(sharer).generate(conversation, max_new_tokens=12, do_sample=False)
    assert ask("tiny-sharer").choices[0].message.content == by_itself.text  # type: ignore[union-attr]
    details = ask(MODEL).usage.prompt_tokens_details
    assert details.sharer_tokens["tiny-sharer"] > 0
    assert details.cache_bytes > 0
    assert ask("tiny-receiver").usage.prompt_tokens_details.sharer_tokens == {}


def test_a_seed_gives_one_answer_and_its_neighbour_another(client: openai.OpenAI):
    conversation: Any = CONVERSATIONS[0]

    def ask(**options: Any) -> list[str | None]:
        answer = client.chat.completions.create(
            model=MODEL, messages=conversation, temperature=1.5, max_tokens=12, **options
        )
        return [choice.message.content for choice in answer.choices]

    first, second = ask(seed=4, n=2)
    assert first != second
    assert (ask(seed=4), ask(seed=5)) == ([first], [second])


def test_texts_are_gone_on_with(client: openai.OpenAI, answering: C2C):
    answer = client.completions.create(model=MODEL, prompt=["the ", "12 =="], temperature=0, max_tokens=6, logprobs=1)
    again = client.completions.create(model=MODEL, prompt="12 ==", temperature=0, max_tokens=6)
    assert answer.choices[1].text == again.choices[0].text
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.tokens or ()) <= 6
    assert all(logprob <= 0 for logprob in answer.choices[0].logprobs.token_logprobs or ())


class TestWithATokenizerThatDropsAFirstSpace:
    @pytest.fixture
    def client(self, spaced_tokenizer: Any, served: Any) -> Iterator[openai.OpenAI]:
        """Of a model that says nothing but words with a space before them."""
        lm = tiny_model("llama", tokenizer=spaced_tokenizer, name="spaced")
        with torch.no_grad():
            weight = lm.model.get_output_embeddings().weight  # type: ignore[operator]
            words = spaced_tokenizer.convert_tokens_to_ids(["▁aa", "▁bb", "▁cc"])
            said = weight[words].clone()
            weight[:] = said.mean(0)  # which is never the largest
            weight[words] = said
        with served(TransformersEngine(C2C(lm))) as address:
            yield openai.OpenAI(base_url=f"{address}/v1", api_key="unused", max_retries=0)

    def test_a_text_is_gone_on_with_behind_a_space(self, client: openai.OpenAI):
        options: Any = {"model": "spaced", "prompt": "aa bb", "temperature": 0, "max_tokens": 4}
        choice = client.completions.create(**options, logprobs=1).choices[0]
        assert choice.logprobs is not None and choice.logprobs.tokens is not None
        assert set(choice.logprobs.tokens) <= {" aa", " bb", " cc"}
        assert choice.text == "".join(choice.logprobs.tokens)
        assert choice.logprobs.text_offset == [0, 3, 6, 9]
        stream = client.completions.create(**options, stream=True)
        assert "".join(piece.choices[0].text for piece in stream) == choice.text

    def test_an_answer_begins_without_one(self, client: openai.OpenAI):
        choice = client.chat.completions.create(
            model="spaced", messages=CONVERSATIONS[0], temperature=0, max_tokens=4, logprobs=True  # type: ignore[arg-type]
        ).choices[0]  # fmt: skip
        assert choice.logprobs is not None and choice.logprobs.content is not None
        text, said = choice.message.content or "", choice.logprobs.content
        assert text == "".join(one.token for one in said)
        assert text.encode() == b"".join(bytes(one.bytes or ()) for one in said)
        assert text.split() == [one.token.strip() for one in said]
        assert not text.startswith(" ")


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"max_tokens": 33}, None, "up to 32"),
        ({"messages": [{"role": "user", "content": "x" * 600}]}, "context_length_exceeded", "context"),
        ({"n": 9}, None, "got 9; allowed: up to 8"),  # more than may wait would never be taken
    ],
)
def test_what_the_pair_cannot_do(client: openai.OpenAI, options: dict[str, Any], code: str, message: str):
    with pytest.raises(openai.BadRequestError, match=message) as refused:
        client.chat.completions.create(**{"model": MODEL, "messages": CONVERSATIONS[0], **options})
    assert refused.value.code == code


def test_more_than_can_wait_are_sent_away(client: openai.OpenAI, monkeypatch: pytest.MonkeyPatch):
    conversation: Any = CONVERSATIONS[0]
    go_on, read = threading.Event(), C2C.read
    monkeypatch.setattr(C2C, "read", lambda *args, **options: go_on.wait(60) and read(*args, **options))

    def ask(n: int) -> Any:
        return client.chat.completions.create(model=MODEL, messages=conversation, n=n, max_tokens=2)

    with ThreadPoolExecutor(2) as several:
        # Four are read for and the others wait, whichever request comes first.
        asking = [several.submit(ask, 8) for _ in range(2)]
        done, others = wait(asking, return_when=FIRST_COMPLETED)
        go_on.set()
        (refused,), (answered,) = done, others
        error = refused.exception()
        assert isinstance(error, openai.RateLimitError)
        assert int(error.response.headers["retry-after"]) >= 1
        assert len(answered.result().choices) == 8
    assert ask(1).usage is not None, "and the next one is answered"


def test_langchain_hears_the_pair(client: openai.OpenAI, answering: C2C):
    model = ChatOpenAI(model=MODEL, base_url=str(client.base_url), api_key="unused", temperature=0, max_tokens=12)  # type: ignore[call-arg, arg-type]
    question = str(CONVERSATIONS[0][0]["content"])
    expected = greedy(answering, CONVERSATIONS[0])
    assert model.invoke(question).content == expected
    assert "".join(str(piece.content) for piece in model.stream(question)) == expected
