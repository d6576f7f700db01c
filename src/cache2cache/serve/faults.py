"""Errors of the OpenAI routes, as responses: those of `problems` and what only these routes know."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from cache2cache.errors import BusyError, RequestError, UnknownModelError
from cache2cache.serve.problems import problem, problem_of


def refusal(error: Exception, *, ready: bool) -> JSONResponse:
    """The response to an error.

    Args:
        ready: whether the server takes requests; one that is about to stop is unavailable rather than busy.
    """
    match error:
        case RequestValidationError():
            return _invalid(error.errors())
        case HTTPException(status_code=400):  # FastAPI could not decode the body
            return problem(400, "the body is not JSON in UTF-8", code="invalid_json")
        case HTTPException():
            return problem(error.status_code, str(error.detail), headers=error.headers)
        case UnknownModelError():
            return problem(404, str(error), code="model_not_found", param="model")
        case RequestError():
            return problem(400, str(error), param=error.field)
        case BusyError() if not ready:
            headers = problem_of(error).headers
            return problem(
                503, str(error), "server_error", code="stopping", headers={"Retry-After": headers["Retry-After"]}
            )
        case _:
            return problem_of(error)


def _invalid(errors: Sequence[Any]) -> JSONResponse:
    """The first fault of a body, with the field's name; never the value, which may be a whole conversation."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return problem(400, f"the body is not JSON: {first['ctx']['error']}", code="invalid_json")
    # Names of unknown fields are the client's words: any length, any character.
    param = ".".join(str(part) for part in first["loc"][1:])[:80].encode("ascii", "backslashreplace").decode()
    if not param:
        return problem(400, "the body is not a JSON object sent as application/json", code="invalid_json")
    message, code = {
        "extra_forbidden": (f"{param} is not supported by this server", "unsupported_parameter"),
        "missing": (f"{param} is missing", "missing_required_parameter"),
    }.get(first["type"], (f"{param}: {first['msg']}", "invalid_value"))
    return problem(400, message, code=code, param=param)
