"""Sends requests to a service that speaks OpenAI's completions API, and notes when tokens come."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import aiohttp

from gllm_ray.batch.api_key import key_headers
from gllm_ray.bench.load_generator import RequestRecord
from gllm_ray.bench.prompts import LoadRequest
from gllm_ray.errors import PipelineError

_MAX_ERROR_CHARS = 300


class CompletionsClient:
    """Streams completions, each over a connection of its own, with greedy sampling.

    Args:
        session: Of aiohttp.
        base_url: Address of the service, without a path.
        ignore_eos: Ask for whole outputs, and take less for a failure.
        extra_body: Added to each request.

    Attributes:
        model: The model as the service names it; set before the first request.
    """

    def __init__(
        self,
        session: aiohttp.ClientSession,
        base_url: str,
        *,
        ignore_eos: bool,
        extra_body: Mapping[str, Any],
    ) -> None:
        self._session = session
        self._url = f"{base_url}/v1/completions"
        self.model = ""
        self._ignore_eos = ignore_eos
        self._extra_body = extra_body

    @classmethod
    @asynccontextmanager
    async def open(
        cls, base_url: str, *, ignore_eos: bool, extra_body: Mapping[str, Any], timeout_s: float
    ) -> AsyncIterator[Self]:
        """A client with a session of its own; a request may take `timeout_s`.

        It shows the API key that the environment has for OpenAI's client, if any.
        """
        # A server may close an idle connection just as it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(
            connector=connector, timeout=timeout, headers=key_headers()
        ) as session:
            yield cls(session, base_url, ignore_eos=ignore_eos, extra_body=extra_body)

    async def send(self, request: LoadRequest, record: RequestRecord) -> None:
        """Stream a completion; see `load_generator.Send`.

        A service that does not tell what it counted sent a token a message.

        Raises:
            PipelineError: The service refused the request, broke off, or sent too few tokens.
        """
        usage: dict[str, Any] = {}
        is_finished = False
        try:
            async with self._session.post(self._url, json=self._body(request)) as response:
                if response.status != 200:
                    text = (await response.text())[:_MAX_ERROR_CHARS]
                    raise PipelineError(f"status {response.status}: {text}")
                async for chunk in _chunks(response.content):
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices") or ():
                        is_last = choice.get("finish_reason") is not None
                        # A last one without text tells only that it is the last.
                        if choice.get("text") or not is_last or not record.message_times_s:
                            record.note_message()
                        is_finished = is_finished or is_last
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            raise PipelineError(f"{type(error).__name__}: {error}") from None
        if not is_finished:
            raise PipelineError("the stream ended before the output did")
        record.num_prompt_tokens = usage.get("prompt_tokens", request.num_prompt_tokens)
        record.num_output_tokens = usage.get("completion_tokens", len(record.message_times_s))
        if usage and self._ignore_eos and record.num_output_tokens != request.num_output_tokens:
            raise PipelineError(
                f"got {record.num_output_tokens} output tokens; asked for "
                f"{request.num_output_tokens}"
            )

    def _body(self, request: LoadRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": request.prompt,
            "max_tokens": request.num_output_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if self._ignore_eos:
            body["ignore_eos"] = True
        if request.expected_output_tokens is not None:
            body["expected_output_tokens"] = request.expected_output_tokens
        if request.tenant:
            body["user"] = request.tenant
        if request.priority:
            body["priority"] = request.priority
        return {**body, **self._extra_body}


async def _chunks(content: aiohttp.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The data of each event up to `[DONE]`, which not every service sends.

    Raises:
        PipelineError: An event tells of an error.
    """
    async for line in content:
        if not line.startswith(b"data:"):
            continue
        data = line.removeprefix(b"data:").strip()
        if data == b"[DONE]":
            return
        chunk = json.loads(data)
        if "error" in chunk:
            raise PipelineError(f"the stream broke off: {str(chunk['error'])[:_MAX_ERROR_CHARS]}")
        yield chunk
