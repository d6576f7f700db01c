"""What a sharer that runs as a service and a pair that listens to it say to each other.

    GET  /v1/sharer   who it is: a `Description`
    POST /v1/cache    prompts in, payloads out: a `CacheRequest`; one payload per prompt, in order, each behind its length

With a shared key both answers are signed. A payload is signed with a key that the request's bytes went into, so that one
made for another request, with other positions or fewer bits, is refused like a forged one.
"""

from __future__ import annotations

import hmac
import struct
from collections.abc import Iterable
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from cache2cache.errors import PayloadError, RequestError
from cache2cache.serve.payload import Precision
from cache2cache.types import ModelCard

CACHE_PATH, SHARER_PATH = "/v1/cache", "/v1/sharer"
MEDIA_TYPE = "application/vnd.cache2cache.payloads"
SIGNATURE_HEADER = "X-C2C-Signature"

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.jinja",
)  # fmt: skip
"""What may travel of a tokenizer: data, no code."""

_LENGTH = struct.Struct("<Q")


class _Strict(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Limits(_Strict):
    """How much a service reads at once."""

    rows: int = Field(gt=0)
    """Prompts of a request."""
    tokens: int = Field(gt=0)
    """Prompts × length of the longest."""


class Description(_Strict):
    """Who a sharer is."""

    card: ModelCard
    dtype: Literal["float32", "bfloat16", "float16"]
    """Of its cache."""
    tokenizer: dict[str, str]
    """Files by name, see `TOKENIZER_FILES`."""
    limits: Limits


class Turn(_Strict):
    """One message."""

    role: Literal["system", "user", "assistant"]
    content: str


class Prompt(_Strict):
    """What is read, as token ids or as messages, and which positions of it are wanted."""

    ids: tuple[int, ...] | None = Field(default=None, min_length=1)
    messages: tuple[Turn, ...] | None = Field(default=None, min_length=1)
    template: Literal["plain", "completion"] | None = None
    """That messages are rendered with; the model's own by default. Named ones only: a template is a program."""
    positions: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Ascending; all by default."""

    @model_validator(mode="after")
    def _one_of_both(self) -> Prompt:
        if (self.ids is None) == (self.messages is None):
            raise ValueError("a prompt is either ids or messages")
        if self.template is not None and self.messages is None:
            raise ValueError("token ids are not rendered, so they have no template")
        return self


class CacheRequest(_Strict):
    """Prompts that are read as one batch, on their own or beside others'."""

    prompts: tuple[Prompt, ...] = Field(min_length=1)
    layers: tuple[int, ...] | None = Field(default=None, min_length=1)
    """Ascending; all by default."""
    precision: Precision | None = None
    """That keys and values travel in; as they are by default."""
    compress: bool = False


M = TypeVar("M", bound=_Strict)


def parse(kind: type[M], raw: bytes) -> M:
    """Read JSON.

    Raises:
        RequestError: a field that is missing, unknown, of another type or out of range; names the first one.
    """
    try:
        return kind.model_validate_json(raw)
    except ValidationError as error:
        fault = error.errors(include_input=False, include_url=False)[0]
        where = ".".join(map(str, fault["loc"]))[:80]
        raise RequestError("the JSON is not what it should be", got=f"{where!r}: {fault['msg']}") from error


def request_key(key: bytes, body: bytes) -> bytes:
    """What the payloads of one request are signed with."""
    return hmac.digest(key, b"cache\0" + body, "sha256")


def signature(key: bytes, description: bytes) -> str:
    """Of a description, 64 hex digits."""
    return hmac.digest(key, b"sharer\0" + description, "sha256").hex()


def join(payloads: Iterable[bytes]) -> bytes:
    """Payloads one behind the other, each behind its length."""
    return b"".join(part for payload in payloads for part in (_LENGTH.pack(len(payload)), payload))


def split(data: bytes, count: int) -> list[memoryview]:
    """The `count` payloads of an answer, as views of it.

    Raises:
        PayloadError: more or fewer of them.
    """
    view, payloads = memoryview(data), []
    while len(view) >= _LENGTH.size and len(payloads) < count:
        (size,) = _LENGTH.unpack_from(view)
        payload, view = view[_LENGTH.size :][:size], view[_LENGTH.size :][size:]
        if len(payload) < size:
            break
        payloads.append(payload)
    if len(view) or len(payloads) != count:
        raise PayloadError("the answer is truncated or continued", got=f"{len(payloads)} payloads", allowed=count)
    return payloads
