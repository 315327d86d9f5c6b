"""A stream that has nothing to tell shows now and then that it is alive."""

import asyncio
from itertools import pairwise

import pytest
from starlette.requests import ClientDisconnect

from gllm_ray.config import ModelsConfig
from gllm_ray.errors import ConfigError, PipelineError
from gllm_ray.serving.streaming import SseResponse
from gllm_ray.strict_schema import parse_strictly
from tests.serving.local_api import BODIES, local_api, openai_over, sse_chunks, wait_until
from tests.serving.test_disconnect import Connection

PATH = "/v1/completions"
COMMENT = ": keep-alive\n\n"
PERIOD_S = 0.01


async def stream_with_a_silence(tokenizer, num_tokens, keep_alive_s, failure=None):
    """The response to a request that gets its next token after many periods."""
    options = {"hold_after": num_tokens, "stream_keep_alive_s": keep_alive_s}
    async with local_api(tokenizer, "abcdefgh", **options) as (service, http):
        call = asyncio.create_task(http.post(PATH, json=BODIES[PATH] | {"stream": True}))
        await wait_until(lambda: service.requests and service.pipeline.num_tokens == num_tokens)
        await asyncio.sleep(20 * PERIOD_S)
        service.pipeline.failure = failure
        service.pipeline.release()
        return await call


def text_of(events):
    return "".join(chunk["choices"][0]["text"] for chunk in events[:-1])


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_silent_stream_sends_comments_beside_its_events(tokenizer, num_tokens):
    response = asyncio.run(stream_with_a_silence(tokenizer, num_tokens, PERIOD_S))
    assert response.text.count(COMMENT) > 1
    assert text_of(sse_chunks(response.text.replace(COMMENT, ""))) == "abcdefgh"


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_stream_without_keep_alive_says_nothing_until_there_is_something(tokenizer, num_tokens):
    response = asyncio.run(stream_with_a_silence(tokenizer, num_tokens, None))
    assert text_of(sse_chunks(response.text)) == "abcdefgh"


def test_an_error_after_a_comment_is_the_last_event(tokenizer):
    error = PipelineError("stage 1 died")
    response = asyncio.run(stream_with_a_silence(tokenizer, 0, PERIOD_S, error))
    assert response.status_code == 200
    (last,) = sse_chunks(response.text.replace(COMMENT, ""))
    assert last["error"]["code"] == "engine_unavailable"


def test_openai_s_client_does_not_see_comments(tokenizer):
    async def main():
        options = {"hold_after": 3, "stream_keep_alive_s": PERIOD_S}
        async with local_api(tokenizer, "abcdefgh", **options) as (service, http):
            asyncio.get_running_loop().call_later(20 * PERIOD_S, service.pipeline.release)
            stream = await openai_over(http).completions.create(
                model=service.model_name, prompt="a", stream=True
            )
            return "".join([chunk.choices[0].text async for chunk in stream])

    assert asyncio.run(main()) == "abcdefgh"


def test_comments_do_not_pile_up_before_a_client_that_reads_nothing(tokenizer):
    async def main():
        connection = Connection(PATH, BODIES[PATH] | {"stream": True}, is_stuck=True)
        async with local_api(tokenizer, "abc", stream_keep_alive_s=PERIOD_S) as (_, http):
            app = http._transport.app
            call = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
            await wait_until(lambda: connection.num_pieces)
            await asyncio.sleep(20 * PERIOD_S)
            call.cancel()
            await asyncio.wait([call])
            return connection.num_pieces

    assert asyncio.run(main()) == 1


def test_a_comment_comes_only_after_a_period_of_silence():
    async def events():
        for _ in range(8):
            await asyncio.sleep(0.7 * PERIOD_S)
            yield "data: x\n\n"

    async def nothing():
        return
        yield

    async def main():
        sent = []

        async def send(message):
            sent.append((message.get("body"), asyncio.get_running_loop().time()))

        first = asyncio.get_running_loop().create_future()
        first.set_result(None)
        response = SseResponse(events(), first, nothing(), PERIOD_S)
        await response({"type": "http", "asgi": {"spec_version": "2.4"}}, None, send)
        return sent

    sent = asyncio.run(main())
    for (_, before_s), (body, now_s) in pairwise(sent):
        assert body != COMMENT.encode() or now_s >= before_s + PERIOD_S


def test_a_client_that_is_gone_before_the_status_is_sent_aborts_its_request(tokenizer):
    async def main():
        connection = Connection(PATH, BODIES[PATH] | {"stream": True})

        async def send(_message):
            raise OSError("gone")

        async with local_api(tokenizer, "abc", hold_after=0, stream_keep_alive_s=PERIOD_S) as (
            service,
            http,
        ):
            with pytest.raises(ClientDisconnect):
                await http._transport.app(connection.scope, connection.receive, send)
            service.pipeline.release()
            await service.until_idle()

    asyncio.run(main())


def test_behind_a_front_end_it_is_the_front_end_that_has_the_setting():
    model = {"model": {"path": "m"}, "deployment": {"stream_keep_alive_s": 5.0}}
    with pytest.raises(ConfigError, match=r"must be frontend\.stream_keep_alive_s"):
        parse_strictly(ModelsConfig, {"models": [model]})
