"""A client that goes away gives its KV blocks back, whenever it goes."""

import asyncio
import json

import pytest

from gllm_ray.serving.openai_api import build_api
from gllm_ray.serving.text_stream import merge_deltas, text_deltas
from tests.factories import make_request
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.local_api import BODIES, wait_until

CHAT_PATH, COMPLETION_PATH = BODIES
MAX_TOKENS = 100


class Connection:
    """One HTTP request, as a server makes it of an application.

    Attributes:
        num_pieces: Pieces of the response's body so far.
    """

    def __init__(self, path, body, *, spec_version="2.4", is_stuck=False):
        self.num_pieces = 0
        self.is_streamed = body["stream"]
        self.scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": spec_version},
            "method": "POST",
            "path": path,
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        self._body = json.dumps(body).encode()
        self._is_sent = False
        self._is_stuck = is_stuck
        self._gone = asyncio.Event()

    def hang_up(self):
        self._gone.set()

    async def receive(self):
        if not self._is_sent:
            self._is_sent = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def send(self, message):
        if message["type"] == "http.response.body":
            self.num_pieces += 1
            if self._is_stuck:
                await asyncio.Event().wait()


def body_of(path, is_streamed, num_prompts):
    body = BODIES[path] | {"stream": is_streamed, "max_tokens": MAX_TOKENS}
    if num_prompts > 1:
        body["prompt"] = ["a"] * num_prompts
    return body


async def leave(tokenizer, connection, hold_after, go_away, keep_alive_s=None):
    """Go away once `hold_after` tokens are there, then let the pipeline go on."""
    pipeline = ScriptedPipeline(tokenizer.encode("abc"), hold_after=hold_after)
    async with LocalService(tokenizer, pipeline) as service:
        app = build_api(service, stream_keep_alive_s=keep_alive_s)
        call = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
        await wait_until(lambda: service.requests and pipeline.num_tokens >= hold_after)
        if (hold_after or keep_alive_s) and connection.is_streamed:
            await wait_until(lambda: connection.num_pieces)
        go_away(call)
        await asyncio.wait([call])
        assert not service.scheduler.is_idle
        pipeline.release()
        await service.until_idle()
        num_requests = len(service.requests)
        assert not service._client._streams
        assert pipeline.num_tokens < num_requests * MAX_TOKENS / 2
        return call


CASES = [
    pytest.param(path, is_streamed, num_prompts, hold_after, id=f"{kind}, {what}, {when}")
    for path, num_prompts, kind in [
        (CHAT_PATH, 1, "chat"),
        (COMPLETION_PATH, 1, "completion"),
        (COMPLETION_PATH, 3, "3 prompts"),
    ]
    for is_streamed, what in [(True, "stream"), (False, "whole")]
    for hold_after, when in [(0, "before the first token"), (9, "in the middle")]
]


@pytest.mark.parametrize(("path", "is_streamed", "num_prompts", "hold_after"), CASES)
def test_a_cancelled_call_is_aborted(tokenizer, path, is_streamed, num_prompts, hold_after):
    async def main():
        connection = Connection(path, body_of(path, is_streamed, num_prompts))
        call = await leave(tokenizer, connection, hold_after, lambda call: call.cancel())
        assert call.cancelled()

    asyncio.run(main())


@pytest.mark.parametrize("spec_version", ["2.3", "2.4"])
@pytest.mark.parametrize(
    ("path", "is_streamed", "num_prompts", "hold_after"), [case for case in CASES if case.values[1]]
)
def test_a_cancelled_stream_that_was_kept_alive_is_aborted(
    tokenizer, path, is_streamed, num_prompts, hold_after, spec_version
):
    async def main():
        body = body_of(path, is_streamed, num_prompts)
        connection = Connection(path, body, spec_version=spec_version)
        await leave(tokenizer, connection, hold_after, lambda call: call.cancel(), 0.001)

    asyncio.run(main())


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_stream_whose_client_reads_no_more_is_aborted_when_cancelled(tokenizer, num_prompts):
    async def main():
        body = body_of(COMPLETION_PATH, True, num_prompts)
        connection = Connection(COMPLETION_PATH, body, is_stuck=True)
        await leave(tokenizer, connection, 9, lambda call: call.cancel())

    asyncio.run(main())


@pytest.mark.parametrize("num_prompts", [1, 3])
def test_a_stream_is_aborted_when_the_server_says_its_client_is_gone(tokenizer, num_prompts):
    async def main():
        body = body_of(COMPLETION_PATH, True, num_prompts)
        connection = Connection(COMPLETION_PATH, body, spec_version="2.3")
        await leave(tokenizer, connection, 9, lambda _call: connection.hang_up())

    asyncio.run(main())


def test_who_reads_several_outputs_and_is_cancelled_twice_aborts_each_of_them(tokenizer):
    async def main():
        pipeline = ScriptedPipeline(tokenizer.encode("abc"), hold_after=6)
        async with LocalService(tokenizer, pipeline) as service:
            streams = [
                text_deltas(
                    index,
                    service.generate(make_request(str(index), max_tokens=MAX_TOKENS)),
                    tokenizer.new_detokenizer((1,)),
                )
                for index in range(2)
            ]
            merged = merge_deltas(streams)
            await anext(merged)  # that of the other output is there, too
            closing = asyncio.create_task(merged.aclose())
            await asyncio.sleep(0)
            closing.cancel()
            await asyncio.wait([closing])
            await wait_until(lambda: not service._client._streams)
            pipeline.release()
            await service.until_idle()
            assert pipeline.num_tokens < MAX_TOKENS

    asyncio.run(main())


def test_one_failed_prompt_ends_the_others(tokenizer):
    async def main():
        pipeline = ScriptedPipeline(tokenizer.encode("abc"), hold_after=6)
        async with LocalService(tokenizer, pipeline) as service:
            connection = Connection(COMPLETION_PATH, body_of(COMPLETION_PATH, True, 3))
            app = build_api(service)
            call = asyncio.create_task(app(connection.scope, connection.receive, connection.send))
            await wait_until(lambda: len(service.requests) == 3 and connection.num_pieces)
            await service._engine.abort(service.requests[1].request_id)
            pipeline.release()
            await call
            await service.until_idle()
            assert pipeline.num_tokens < MAX_TOKENS

    asyncio.run(main())
