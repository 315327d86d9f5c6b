"""Who answers rows: the engine of a pipeline, or a service that runs already."""

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any, Protocol, Self

import aiohttp
from fastapi.exceptions import RequestValidationError

from gllm_ray.batch.records import Answer, BatchRow
from gllm_ray.batch.requests import RequestChecks, build_requests
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import (
    ConfigError,
    InvalidRequestError,
    OverloadedError,
    PipelineError,
)
from gllm_ray.messages import GenerationRequest, TokenEvent
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.generation_requests import RequestBuilder
from gllm_ray.serving.openai_api import whole_response
from gllm_ray.serving.openai_responses import ResponseHead

_BUSY_STATUS = (429, 502, 503, 504)
_FIRST_DELAY_S = 1.0
_MAX_DELAY_S = 60.0
_LOOK_UP_TIMEOUT_S = 30.0


class Answers(Protocol):
    """Answers rows, many at once."""

    async def answer(self, row: BatchRow) -> Answer:
        """Run a row, or tell why it failed.

        Raises:
            PipelineError: No row can be run any more.
        """


class EngineAnswers:
    """Runs rows on an engine in reach of this process; a `TokenService`.

    Args:
        client: Of the engine; started.
        model_name: As rows name it.
        tokenizer: The model's.
        max_model_len: Tokens of prompt and output a sequence may have.
        is_single: See `RequestChecks`.
    """

    def __init__(
        self,
        client: EngineClient,
        *,
        model_name: str,
        tokenizer: Tokenizer,
        max_model_len: int,
        is_single: bool = False,
    ) -> None:
        self.tokenizer = tokenizer
        self._client = client
        self._builder = RequestBuilder(tokenizer, max_model_len)
        self._checks = RequestChecks(
            model_name=model_name, builder=self._builder, is_single=is_single
        )

    async def answer(self, row: BatchRow) -> Answer:
        """See `Answers.answer`."""
        try:
            body = self._checks.parse_body(row)
            is_chat, model = row.url == "/v1/chat/completions", self._checks.model_name
            token_bytes = self.tokenizer.vocabulary.token_bytes
            head = ResponseHead.new(model=model, is_chat=is_chat, token_bytes=token_bytes)
            requests = await build_requests(self._builder, body, head.id)
            return Answer(status=200, body=await whole_response(self, body, head, requests))
        except (InvalidRequestError, OverloadedError, RequestValidationError) as error:
            return Answer.of_error(error)

    def generate(self, request: GenerationRequest) -> AsyncGenerator[list[TokenEvent], None]:
        """See `EngineClient.generate`."""
        return self._client.generate(request)


class HttpAnswers:
    """Sends rows to a service; waits where it has no room for them.

    Args:
        session: Of aiohttp.
        base_url: Address of the service, without a path.
    """

    def __init__(self, session: aiohttp.ClientSession, base_url: str) -> None:
        self._session = session
        self._base_url = base_url

    @classmethod
    @asynccontextmanager
    async def open(
        cls, base_url: str, *, headers: Mapping[str, str], timeout_s: float
    ) -> AsyncIterator[Self]:
        """Answers over a session of their own, with headers; a row may take `timeout_s`."""
        # A service may close an idle connection just as it is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=timeout_s)
        async with aiohttp.ClientSession(
            connector=connector, headers=headers, timeout=timeout
        ) as session:
            yield cls(session, base_url)

    async def answer(self, row: BatchRow) -> Answer:
        """See `Answers.answer`."""
        delay_s = _FIRST_DELAY_S
        while True:
            is_last = delay_s > _MAX_DELAY_S
            wait_s = delay_s
            try:
                async with self._session.post(self._base_url + row.url, json=row.body) as response:
                    if response.status == HTTPStatus.UNAUTHORIZED:
                        raise PipelineError(f"{self._base_url} does not take the API key any more")
                    if response.status not in _BUSY_STATUS:
                        return Answer(status=response.status, body=await _read_body(response))
                    if is_last:
                        raise PipelineError(
                            f"{self._base_url} has no room for requests, or is down: it answers "
                            f"with status {response.status} again and again"
                        )
                    wait_s = max(wait_s, _retry_after_s(response))
            except (aiohttp.ClientError, TimeoutError) as error:
                if is_last:
                    raise PipelineError(f"{self._base_url} {self._fault(error)}") from error
            await asyncio.sleep(wait_s)
            delay_s *= 2

    def _fault(self, error: Exception) -> str:
        if isinstance(error, TimeoutError):
            timeout_s = self._session.timeout.total
            return f"took longer than {timeout_s} s (--timeout-s) for a row, again and again"
        return f"cannot be reached: {type(error).__name__}: {error}"


async def look_up_model(base_url: str, headers: Mapping[str, str]) -> dict[str, Any]:
    """The card of the one model of a service.

    Raises:
        ConfigError: Nothing answers there, or not as a service of one model does.
    """
    url = f"{base_url}/v1/models"
    timeout = aiohttp.ClientTimeout(total=_LOOK_UP_TIMEOUT_S)
    try:
        async with (
            aiohttp.ClientSession(headers=headers, timeout=timeout) as session,
            session.get(url) as response,
        ):
            if response.status == HTTPStatus.UNAUTHORIZED:
                fault = "refuses the API key" if headers else "wants an API key"
                raise ConfigError(f"{url}: {fault}; --api-key-env names the variable that has it")
            response.raise_for_status()
            cards = (await response.json())["data"]
            if len(cards) > 1:
                names = ", ".join(str(card["id"]) for card in cards)
                raise ConfigError(
                    f"{url}: has several models ({names}); a batch needs a service of one"
                )
            (card,) = cards
            return {"id": card["id"], "max_model_len": card.get("max_model_len")}
    except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError) as error:
        raise ConfigError(f"--url={base_url}: must be an address as http://host:port") from error
    except (aiohttp.ClientError, TimeoutError, ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{url}: tells of no one model: {type(error).__name__}: {error}"
        ) from error


def _retry_after_s(response: aiohttp.ClientResponse) -> float:
    value = response.headers.get("Retry-After", "")
    return float(value) if value.isdecimal() else 0.0


async def _read_body(response: aiohttp.ClientResponse) -> dict[str, Any]:
    try:
        body = await response.json(content_type=None)
    except ValueError:
        body = None
    if isinstance(body, dict):
        return body
    return {"error": {"message": f"status {response.status}, and no JSON", "code": None}}
