"""The one table from an exception to an HTTP status and a body in OpenAI's shape.

What a client is told is bounded, and an error that was not raised on purpose tells nothing.
"""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gllm_ray.errors import GllmRayError, InvalidRequestError, OverloadedError, PipelineError
from gllm_ray.strict_schema import spell_value

_MAX_MISTAKES = 10
_MAX_CHARS = 200
_MAX_MESSAGE_CHARS = _MAX_MISTAKES * _MAX_CHARS
_PIPELINE_RETRY_AFTER_S = 5

_INVALID = "invalid_request_error"
_NOT_AN_OBJECT = (
    "the body must be a JSON object in Unicode, sent with Content-Type: application/json"
)
# What makes Python's parser give up without a word of JSON, and FastAPI answer 400.
_UNREADABLE = "the body is not in UTF-8, is nested too deeply, or has a number of too many digits"
# By pydantic's type of a mistake.
_CODES = {
    "extra_forbidden": "unknown_parameter",
    "json_invalid": "invalid_json",
    "missing": "missing_required_parameter",
    "unsupported_parameter": "unsupported_parameter",
}
# The same in words of JSON; `given` is what the client sent, and the rest pydantic tells.
_WORDS = {
    "bool_type": "must be true or false, not {given}",
    "dict_type": "must be an object, not {given}",
    "extra_forbidden": "is not a known parameter",
    "finite_number": "must be a finite number",
    "float_type": "must be a number, not {given}",
    "greater_than": "must be above {gt}",
    "greater_than_equal": "must be at least {ge}",
    "int_type": "must be a whole number, not {given}",
    "json_invalid": "the body is not valid JSON: {error}",
    "less_than": "must be below {lt}",
    "less_than_equal": "must be at most {le}",
    "list_type": "must be a list, not {given}",
    "literal_error": "must be {expected}, not {given}",
    "missing": "is required",
    "model_attributes_type": "must be an object, not {given}",
    "model_type": "must be an object, not {given}",
    "string_pattern_mismatch": "must match {pattern}",
    "string_too_long": "must have at most {max_length} characters",
    "string_too_short": "must have {min_length} or more characters",
    "string_type": "must be text, not {given}",
    "string_unicode": "must be valid Unicode",
    "too_long": "must have at most {max_length} items, not {actual_length}",
    "too_short": "must have {min_length} or more items, not {actual_length}",
}
_KINDS = {
    bool: "a truth value",
    dict: "an object",
    float: "a decimal number",
    int: "a number",
    list: "a list",
    str: "text",
}


@dataclass(frozen=True, slots=True)
class HttpError:
    """What a client is told of an exception."""

    status: int
    message: str
    type: str
    code: str | None = None
    param: str | None = None
    headers: Mapping[str, str] | None = None

    @classmethod
    def of(cls, error: Exception) -> "HttpError":
        """Look an exception up in the table."""
        match error:
            case InvalidRequestError(message=message, code=code, param=param):
                status = 404 if code == "model_not_found" else 400
                return cls(status, message, _INVALID, code, param)
            case RequestValidationError():
                return _describe_mistakes(error)
            case HTTPException(status_code=status, detail=detail, headers=headers):
                is_unread = status == 400
                message, code = (_UNREADABLE, "invalid_json") if is_unread else (detail, None)
                return cls(status, message, _INVALID, code, headers=headers)
            case OverloadedError(message=message):
                retry = {"Retry-After": str(math.ceil(error.retry_after_s))}
                return cls(429, message, "rate_limit_error", "server_busy", headers=retry)
            case PipelineError():
                retry = {"Retry-After": str(_PIPELINE_RETRY_AFTER_S)}
                message = error.public_message
                return cls(503, message, "server_error", "engine_unavailable", headers=retry)
        return cls(500, "internal error", "server_error", "server_error")

    def fields(self) -> dict[str, str | None]:
        """The fields of OpenAI's errors."""
        return {
            "message": self.message[:_MAX_MESSAGE_CHARS],
            "type": self.type,
            "param": self.param and self.param[:_MAX_CHARS],
            "code": self.code,
        }

    def body(self) -> str:
        """JSON in the shape of OpenAI's errors."""
        # ASCII, because a client's text may hold what UTF-8 cannot encode.
        return json.dumps({"error": self.fields()})


def _describe_mistakes(error: RequestValidationError) -> HttpError:
    mistakes = [_describe_mistake(item) for item in error.errors()[:_MAX_MISTAKES]]
    lines, codes, params = zip(*mistakes, strict=True)
    return HttpError(400, "; ".join(lines), _INVALID, codes[0], params[0])


def _describe_mistake(item: Mapping[str, Any]) -> tuple[str, str, str | None]:
    """The line, the code and the parameter of one mistake."""
    code = _CODES.get(item["type"], "invalid_value")
    words = _words(item)
    _, *path = item["loc"]
    if item["type"] == "json_invalid":
        return f"{words} (character {path[0] + 1})", code, None
    if item["type"] == "too_many_keys" and not path:
        return f"the body {words}", code, None
    if not path:
        return _NOT_AN_OBJECT, "invalid_json", None
    param = path[0] + "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path[1:])
    # A number is the client's own and short; text may be a prompt.
    value = f"={spell_value(item['input'])}" if isinstance(item["input"], int | float) else ""
    return f"{param[:_MAX_CHARS]}{value}: {words}"[:_MAX_CHARS], code, param


def _words(item: Mapping[str, Any]) -> str:
    """What is wrong, and what would be right."""
    if item["type"] not in _WORDS:
        return str(item["msg"])  # our own
    value = item["input"]
    given = _KINDS.get(type(value), "null")
    if item["type"] == "literal_error" and isinstance(value, str):
        given = spell_value(value)  # where a word of a few is meant, and no prompt
    limits = {
        name: int(limit) if isinstance(limit, float) and limit.is_integer() else limit
        for name, limit in item.get("ctx", {}).items()
    }
    return _WORDS[item["type"]].format(given=given, **limits)


async def handle_error(_request: Request, error: Exception) -> Response:
    """Answer with the table's row; an exception handler of the application."""
    told = HttpError.of(error)
    return Response(told.body(), told.status, told.headers, media_type="application/json")


async def _handle_http_error(request: Request, error: HTTPException) -> Response:
    """Say what is served instead of a path or method that is not."""
    asked = f"{request.method} {request.url.path[:_MAX_CHARS]} is not served; "
    match error:
        case HTTPException(status_code=404, detail="Not Found"):
            paths = request.app.openapi()["paths"]
            served = [f"{method.upper()} {path}" for path in paths for method in paths[path]]
            error = HTTPException(404, f"{asked}there are {', '.join(served)}")
        case HTTPException(status_code=405, headers={"Allow": methods}):
            error = HTTPException(405, f"{asked}use {methods}", error.headers)
    return await handle_error(request, error)


def install_error_handlers(app: FastAPI) -> None:
    """Answer every error of an application in OpenAI's shape."""
    for kind in (GllmRayError, RequestValidationError, Exception):
        app.add_exception_handler(kind, handle_error)
    app.add_exception_handler(HTTPException, _handle_http_error)


class BodyLimit:
    """ASGI middleware that reads no more of a request's body than it may have.

    Args:
        app: Answers the `HTTPException` 413 that reading a longer body raises.
        max_body_bytes: The most a body may have.
    """

    def __init__(self, app: ASGIApp, max_body_bytes: int) -> None:
        self._app = app
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection."""
        num_bytes = 0

        async def limited_receive() -> Message:
            nonlocal num_bytes
            message = await receive()
            num_bytes += len(message.get("body", b""))
            if num_bytes > self._max_body_bytes:
                raise HTTPException(413, f"the body is larger than {self._max_body_bytes} bytes")
            return message

        await self._app(scope, limited_receive, send)
