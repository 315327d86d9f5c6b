"""What a full service does not take is a 429 that says when to come again."""

import asyncio
from contextlib import asynccontextmanager

import openai
import pytest

from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import OverloadedError
from gllm_ray.messages import FinishReason, TokenEvent
from tests.fakes import LocalService, ScriptedEndpoint
from tests.serving.local_api import (
    BODIES,
    http_client,
    openai_over,
    sse_chunks,
    wait_until,
)

CHAT_PATH, COMPLETION_PATH = BODIES


class EndpointWithRoom(ScriptedEndpoint):
    """An engine endpoint that takes so many requests and refuses the rest."""

    def __init__(self, room):
        super().__init__()
        self._room = room

    async def add(self, request):
        if len(self.added) == self._room:
            self.refusal = OverloadedError("the queue is full", retry_after_s=7.2)
        await super().add(request)


class EndpointService:
    """A `GenerationService` over an engine endpoint that the test speaks for."""

    model_name = LocalService.model_name
    max_model_len = 128

    def __init__(self, tokenizer, endpoint):
        self.tokenizer = tokenizer
        self.endpoint = endpoint
        self.client = EngineClient(endpoint)

    def generate(self, request):
        return self.client.generate(request)

    async def check_ready(self):
        await self.client.check_health()

    async def server_info(self):
        return {}


@asynccontextmanager
async def served(tokenizer, room=128):
    """Yield an endpoint and an HTTP client; in the end no stream is left open."""
    service = EndpointService(tokenizer, EndpointWithRoom(room))
    await service.client.start()
    async with http_client(service) as http:
        yield service.endpoint, http
    assert not service.client._streams
    await service.client.close()


def expired(request):
    return TokenEvent(
        request.request_id,
        finish_reason=FinishReason.EXPIRED,
        error="waited 3 s; send it again in 5 s",
        retry_after_s=4.1,
    )


async def post_and_then(http, endpoint, path, change, num_added, *events_of):
    """The response to a body of which `events_of` make events once its requests are added."""
    call = asyncio.create_task(http.post(path, json=BODIES[path] | change))
    await wait_until(lambda: len(endpoint.added) == num_added)
    for event_of in events_of:
        endpoint.send(event_of(endpoint.added))
        await asyncio.sleep(0.01)
    return await call


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_request_that_is_to_blame_for_faults_is_a_400_which_no_client_repeats(
    tokenizer, is_streamed
):
    def blamed(added):
        return TokenEvent(
            added[0].request_id, finish_reason=FinishReason.BLAMED, error="a stage failed"
        )

    async def main():
        async with served(tokenizer) as (endpoint, http):
            return await post_and_then(
                http, endpoint, CHAT_PATH, {"stream": is_streamed}, 1, blamed
            )

    response = asyncio.run(main())
    assert (response.status_code, response.headers.get("retry-after")) == (400, None)
    assert response.json()["error"] == {
        "message": "a stage failed",
        "type": "invalid_request_error",
        "param": None,
        "code": "request_breaks_engine",
    }


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_request_that_waited_too_long_is_a_429_with_retry_after(tokenizer, path, is_streamed):
    async def main():
        async with served(tokenizer) as (endpoint, http):
            change = {"stream": is_streamed}
            response = await post_and_then(
                http, endpoint, path, change, 1, lambda added: expired(added[0])
            )
            assert endpoint.aborted == []
            return response

    response = asyncio.run(main())
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")
    assert response.json()["error"] == {
        "message": "waited 3 s; send it again in 5 s",
        "type": "rate_limit_error",
        "param": None,
        "code": "server_busy",
    }


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_openais_client_sees_a_refusal_as_its_rate_limit_error(tokenizer, path, is_streamed):
    async def main():
        async with served(tokenizer, room=0) as (endpoint, http):
            client = openai_over(http)
            api = client.chat.completions if path == CHAT_PATH else client.completions
            with pytest.raises(openai.RateLimitError) as caught:
                await api.create(**BODIES[path], stream=is_streamed)
            assert (endpoint.added, endpoint.aborted) == ([], [])
            return caught.value

    error = asyncio.run(main())
    assert (error.status_code, error.code, error.type) == (429, "server_busy", "rate_limit_error")
    assert error.response.headers["retry-after"] == "8"
    assert error.body["message"] == "the queue is full"


SEVERAL = [
    pytest.param(CHAT_PATH, {"n": 4}, id="n"),
    pytest.param(COMPLETION_PATH, {"prompt": ["a"] * 4}, id="prompts"),
    pytest.param(COMPLETION_PATH, {"prompt": ["a", "b"], "n": 2}, id="n prompts"),
]


@pytest.mark.parametrize(("path", "change"), SEVERAL)
@pytest.mark.parametrize("is_streamed", [True, False])
@pytest.mark.parametrize("is_added", [True, False], ids=["added", "being added"])
def test_one_refused_output_aborts_the_others(tokenizer, path, change, is_streamed, is_added):
    async def main():
        async with served(tokenizer, room=2) as (endpoint, http):
            if not is_added:
                endpoint.may_add.clear()
            response = await http.post(path, json=BODIES[path] | change | {"stream": is_streamed})
            assert len(endpoint.added) == 2
            assert sorted(endpoint.aborted) == [item.request_id for item in endpoint.added]
            return response

    response = asyncio.run(main())
    assert (response.status_code, response.headers["retry-after"]) == (429, "8")
    assert response.json()["error"]["message"] == "the queue is full"


@pytest.mark.parametrize(("path", "change"), SEVERAL)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_one_expired_output_aborts_the_others(tokenizer, path, change, is_streamed):
    async def main():
        async with served(tokenizer) as (endpoint, http):
            response = await post_and_then(
                http,
                endpoint,
                path,
                change | {"stream": is_streamed},
                4,
                lambda added: expired(added[2]),
            )
            others = [endpoint.added[index].request_id for index in (0, 1, 3)]
            assert sorted(endpoint.aborted) == others
            return response

    response = asyncio.run(main())
    assert (response.status_code, response.headers["retry-after"]) == (429, "5")


@pytest.mark.parametrize(("path", "change"), SEVERAL)
def test_an_output_that_expires_after_anothers_first_token_is_the_last_event(
    tokenizer, path, change
):
    async def main():
        async with served(tokenizer) as (endpoint, http):
            token_id = tokenizer.encode("a")[0]
            return await post_and_then(
                http,
                endpoint,
                path,
                change | {"stream": True},
                4,
                lambda added: TokenEvent(added[1].request_id, token_id),
                lambda added: expired(added[0]),
            )

    response = asyncio.run(main())
    assert response.status_code == 200
    *chunks, last = sse_chunks(response.text)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {1}
    assert last["error"]["code"] == "server_busy"
    assert last["error"]["message"] == "waited 3 s; send it again in 5 s"
