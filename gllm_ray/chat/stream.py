"""One streaming chat request, timed, with nothing but the standard library."""

import json
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError

REQUEST_TIMEOUT_S = 120.0


class ServiceError(Exception):
    """The service refused a request, or gave it up; says why in the service's words."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatTiming:
    """How fast one answer came.

    Attributes:
        ttft_s: From sending the request to the first text.
        tokens_per_s: Output tokens after the first, over the time they took.
    """

    ttft_s: float
    tokens_per_s: float


def get_json(
    url: str, timeout_s: float = 5.0, headers: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """Fetch a JSON object; raises `OSError` while nothing answers there."""
    request = urllib.request.Request(url, headers=dict(headers or {}))
    with urllib.request.urlopen(request, timeout=timeout_s) as response:
        content = json.load(response)
    assert isinstance(content, dict)
    return content


def stream_chat(
    base_url: str, body: dict[str, Any], headers: Mapping[str, str] | None = None
) -> Iterator[str | ChatTiming]:
    """Yield the text of a chat completion as it comes, then its timing.

    Args:
        base_url: Address of the service, without a path.
        body: The request, without `stream` and `stream_options`.
        headers: Beside those of the body, such as an API key's.

    Raises:
        ServiceError: The service refused the request, or gave it up.
        OSError: Nothing answers there, or no longer.
    """
    body = body | {"stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        f"{base_url}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    start = first = last = time.perf_counter()
    num_tokens = 0
    try:
        with urllib.request.urlopen(request, timeout=REQUEST_TIMEOUT_S) as response:
            for chunk in _chunks(response):
                if usage := chunk.get("usage"):
                    num_tokens = usage["completion_tokens"]
                for choice in chunk["choices"]:
                    if text := choice["delta"].get("content"):
                        last = time.perf_counter()
                        first = last if first == start else first
                        yield text
    except HTTPError as error:
        raise ServiceError(reason_of(error)) from error
    except HTTPException as error:
        raise ConnectionError("the service went away amid the answer") from error
    yield ChatTiming(
        ttft_s=first - start, tokens_per_s=(num_tokens - 1) / (last - first) if last > first else 0
    )


def reason_of(error: HTTPError) -> str:
    """The message of an error in OpenAI's form, or its status where it has another one."""
    with suppress(ValueError, LookupError, TypeError):
        return str(json.load(error)["error"]["message"])
    return f"HTTP status {error.code} ({error.reason})"


def _chunks(lines: Any) -> Iterator[dict[str, Any]]:  # noqa: ANN401  an HTTP response
    for raw in lines:
        line = raw.decode().strip()
        if line.startswith("data: ") and line != "data: [DONE]":
            chunk = json.loads(line.removeprefix("data: "))
            if "error" in chunk:
                raise ServiceError(chunk["error"]["message"])
            yield chunk
