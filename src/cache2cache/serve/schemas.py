"""What clients of the OpenAI API may ask for. A field that is not served is refused by name, never ignored."""

from __future__ import annotations

import secrets
from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from cache2cache.serve.engine import Sampling
from cache2cache.serve.fields import Body, Content, Name, Sharer, Stops, Texts
from cache2cache.types import Conversation, Message

_SEEDS = 1 << 63
"""A seed has 64 bits, one of them the sign."""


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Content

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "name": (), "refusal": (), "annotations": ([],), "audio": (), "function_call": (), "tool_calls": ([],),
    }  # fmt: skip


class StreamOptions(Body):
    """See `Asked.stream_options`."""

    include_usage: bool = False

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {"include_obfuscation": (False,)}


class Asked(Body):
    """What both kinds of request have in common."""

    model: Name
    """One of `/v1/models`."""
    sharers: list[Sharer] | None = Field(default=None, max_length=64)
    """Which sharers speak, by id or index; an extension. All by default; none is the receiver alone."""
    n: int | None = Field(default=None, ge=1, le=128)
    """Answers per prompt."""
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    """1 by default, as at OpenAI; 0 is greedy."""
    top_p: float | None = Field(default=None, gt=0, le=1)
    seed: int | None = Field(default=None, ge=-_SEEDS, lt=_SEEDS)
    """Of the first answer; each further one has the next seed. Random by default."""
    stop: Stops | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @field_validator("stream_options", mode="after")
    @classmethod
    def _streamed(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise PydanticCustomError("stream_options", "goes only with stream: true")
        return value

    @property
    def prompts(self) -> list[Conversation] | list[str]:
        """What is to be answered."""
        raise NotImplementedError

    @property
    def limit(self) -> int | None:
        """Most tokens of an answer."""
        return self.max_tokens

    @property
    def alternatives(self) -> int | None:
        """`Sampling.logprobs`"""
        raise NotImplementedError

    def samplings(self) -> list[Sampling]:
        """How each answer is drawn, n per prompt."""
        first = secrets.randbits(63) if self.seed is None else self.seed
        return [
            Sampling(
                max_tokens=self.limit,
                temperature=1.0 if self.temperature is None else self.temperature,
                top_p=1.0 if self.top_p is None else self.top_p,
                seed=(first + i + _SEEDS) % (2 * _SEEDS) - _SEEDS,
                stop=tuple(self.stop or ()),
                logprobs=self.alternatives,
            )
            for i in range(len(self.prompts) * (self.n or 1))
        ]


class ChatRequest(Asked):
    """POST /v1/chat/completions"""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    """The newer name of max_tokens."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "audio": (), "frequency_penalty": (0,), "function_call": ("none",), "functions": ([],), "logit_bias": ({},),
        "metadata": ({},), "modalities": (["text"],), "parallel_tool_calls": (), "prediction": (),
        "presence_penalty": (0,), "prompt_cache_key": (), "reasoning_effort": ("none",),
        "response_format": ({"type": "text"},), "safety_identifier": (), "service_tier": ("auto", "default"),
        "store": (False,), "tool_choice": ("none",), "tools": ([],), "user": (), "verbosity": (),
        "web_search_options": (),
    }  # fmt: skip

    @field_validator("max_completion_tokens", mode="after")
    @classmethod
    def _one_limit(cls, value: int | None, info: ValidationInfo) -> int | None:
        if None not in (value, other := info.data.get("max_tokens")) and value != other:
            raise PydanticCustomError("limit", "differs from max_tokens, which means the same")
        return value

    @field_validator("top_logprobs", mode="after")
    @classmethod
    def _with_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value is not None and not info.data.get("logprobs"):
            raise PydanticCustomError("top_logprobs", "goes only with logprobs: true")
        return value

    @property
    def prompts(self) -> list[Conversation]:
        return [[Message(role=message.role, content=message.content) for message in self.messages]]

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def alternatives(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(Asked):
    """POST /v1/completions"""

    prompt: Texts
    """Texts that are read as they are, without a template."""
    logprobs: int | None = Field(default=None, ge=0, le=20)

    neutral: ClassVar[dict[str, tuple[object, ...]]] = {
        "best_of": (1,), "echo": (False,), "frequency_penalty": (0,), "logit_bias": ({},), "presence_penalty": (0,),
        "suffix": (), "user": (),
    }  # fmt: skip

    @property
    def prompts(self) -> list[str]:
        return self.prompt

    @property
    def limit(self) -> int:
        """16 by default, as at OpenAI."""
        return self.max_tokens or 16

    @property
    def alternatives(self) -> int | None:
        return self.logprobs
