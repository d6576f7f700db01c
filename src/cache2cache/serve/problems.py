"""Errors as they travel over HTTP: in OpenAI's shape, which its clients turn into exceptions with a message."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

from starlette.responses import JSONResponse

from cache2cache.errors import (
    AlignmentError,
    BusyError,
    C2CError,
    ContextLengthError,
    ConversationError,
    RequestError,
    SharerError,
    TemplateError,
)

Kind = Literal["invalid_request_error", "authentication_error", "rate_limit_error", "server_error"]

_SENDERS_FAULT = (RequestError, ConversationError, TemplateError, AlignmentError)


def problem(
    status: int,
    message: str,
    kind: Kind = "invalid_request_error",
    *,
    code: str | None = None,
    param: str | None = None,
    headers: Mapping[str, str] | None = None,
) -> JSONResponse:
    """An error response.

    Args:
        code: for programs, such as `context_length_exceeded`.
        param: the field of the request that is at fault.
    """
    error = {"message": message, "type": kind, "param": param, "code": code}
    return JSONResponse({"error": error}, status, headers)


def problem_of(error: Exception) -> JSONResponse:
    """The response to an error. What is not the sender's to know is left to the log."""
    match error:
        case BusyError():
            headers = {"Retry-After": str(max(1, math.ceil(error.retry_after)))}
            return problem(429, str(error), "rate_limit_error", code="busy", headers=headers)
        case ContextLengthError():
            return problem(400, str(error), code="context_length_exceeded")
        case C2CError() if isinstance(error, _SENDERS_FAULT):
            return problem(400, str(error))
        case SharerError():
            return problem(502, str(error), "server_error", code="sharer_failed")
        case TimeoutError():
            return problem(504, "the request took too long", "server_error", code="timeout")
        case _:
            return problem(500, "something went wrong here; the log says what", "server_error")
