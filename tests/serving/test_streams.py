"""What a stream says, byte for byte, and how it ends."""

import asyncio
import re

import httpx
import pytest

from gllm_ray.errors import PipelineError
from gllm_ray.messages import FinishReason, GenerationRequest, TokenEvent
from gllm_ray.model.detokenizer import StopRule
from gllm_ray.serving.openai_api import build_api
from gllm_ray.serving.openai_responses import ChunkWriter, ResponseHead
from gllm_ray.serving.streaming import sse_events, stream_response
from gllm_ray.serving.text_stream import TextDelta, merge_deltas, text_deltas
from gllm_ray.serving.usage import UsageMeter
from tests.factories import make_request
from tests.serving.local_api import BODIES, local_api, sse_chunks, wait_until

CHAT_PATH, COMPLETION_PATH = BODIES


def stream(tokenizer, path, change=(), text="hi €", **options):
    """The response to a streaming request."""

    async def main():
        async with local_api(tokenizer, text, **options) as (_, http):
            return await http.post(path, json=BODIES[path] | {"stream": True} | dict(change))

    return asyncio.run(main())


def without_identity(body: str) -> str:
    body, num_ids = re.subn(r'"id":"(chatcmpl|cmpl)-[0-9a-f]{32}"', r'"id":"\1-ID"', body)
    body, num_times = re.subn(r'"created":\d{10},', '"created":TIME,', body)
    assert num_ids == num_times > 0
    return body


CHAT_HEAD = (
    'data: {"id":"chatcmpl-ID","object":"chat.completion.chunk","created":TIME,'
    '"model":"demo/model","choices":['
)
COMPLETION_HEAD = (
    'data: {"id":"cmpl-ID","object":"text_completion","created":TIME,'
    '"model":"demo/model","choices":['
)


def test_a_chat_stream_byte_for_byte(tokenizer):
    response = stream(tokenizer, CHAT_PATH, text="a")
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert without_identity(response.text) == (
        CHAT_HEAD + '{"index":0,"delta":{"role":"assistant","content":""},"logprobs":null,'
        '"finish_reason":null}]}\n\n'
        + CHAT_HEAD
        + '{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null}]}\n\n'
        + CHAT_HEAD
        + '{"index":0,"delta":{},"logprobs":null,"finish_reason":"stop","stop_reason":null}]}\n\n'
        + "data: [DONE]\n\n"
    )


def test_a_completion_stream_with_usage_byte_for_byte(tokenizer):
    change = {"stream_options": {"include_usage": True}, "max_tokens": 1, "prompt": [5, 6]}
    response = stream(tokenizer, COMPLETION_PATH, change, script=tokenizer.encode('"'))
    assert without_identity(response.text) == (
        COMPLETION_HEAD
        + '{"index":0,"text":"\\"","logprobs":null,"finish_reason":null}],"usage":null}\n\n'
        + COMPLETION_HEAD
        + '{"index":0,"text":"","logprobs":null,"finish_reason":"length","stop_reason":null}],'
        '"usage":null}\n\n'
        + COMPLETION_HEAD
        + '],"usage":{"prompt_tokens":2,"completion_tokens":1,"total_tokens":3,'
        '"prompt_tokens_details":{"cached_tokens":0}}}\n\n' + "data: [DONE]\n\n"
    )


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("n", [1, 2])
def test_with_continuous_usage_each_chunk_tells_the_tokens_so_far(tokenizer, path, n):
    options = {"include_usage": True, "continuous_usage_stats": True}
    change = {"stream_options": options, "n": n, "max_tokens": 5}
    *chunks, last, done = sse_chunks(stream(tokenizer, path, change, "one two three " * 9).text)
    so_far = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert so_far == sorted(so_far)
    # The first chunk of a chat tells a role, and has no token.
    assert {int(path == COMPLETION_PATH), 1, 5 * n} <= {*so_far}
    for chunk in chunks:
        usage = chunk["usage"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert (last["choices"], last["usage"], done) == ([], chunks[-1]["usage"], "[DONE]")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("text", ["naïve € 😀\n\n", "a\u2028b\x85c\r\nd", 'data: "x"\\'])
def test_any_text_survives_its_events(tokenizer, path, text):
    *chunks, done = sse_chunks(stream(tokenizer, path, {"max_tokens": 60}, text).text)
    pieces = [
        choice["delta"].get("content", "") if path == CHAT_PATH else choice["text"]
        for choice in (chunk["choices"][0] for chunk in chunks)
    ]
    assert "".join(pieces) == text
    assert done == "[DONE]"


def test_an_event_never_carries_part_of_a_character_or_nothing(tokenizer):
    body = stream(tokenizer, COMPLETION_PATH, {"max_tokens": 60}, "€😀€").text
    *chunks, last, _ = sse_chunks(body)
    pieces = [chunk["choices"][0]["text"] for chunk in chunks]
    assert "".join(pieces) == "€😀€"
    assert "" not in pieces
    assert last["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("num_prompts", [1, 2])
def test_an_error_before_the_first_token_has_its_own_status(tokenizer, path, num_prompts):
    async def main():
        async with local_api(tokenizer, "abc", hold_after=0) as (service, http):
            change = {"stream": True}
            if path == COMPLETION_PATH:
                change["prompt"] = ["a"] * num_prompts
            call = asyncio.create_task(http.post(path, json=BODIES[path] | change))
            await wait_until(lambda: service.requests)
            service.pipeline.failure = PipelineError("stage 1 died")
            service.pipeline.release()
            return await call

    response = asyncio.run(main())
    assert response.status_code == 503
    assert response.headers["retry-after"] == "5"
    assert response.json()["error"]["message"] == PipelineError.public_message


@pytest.mark.parametrize("path", BODIES)
def test_an_error_after_the_first_token_is_the_last_event(tokenizer, path):
    async def main():
        async with local_api(tokenizer, "abcdefgh", hold_after=3) as (service, http):
            call = asyncio.create_task(http.post(path, json=BODIES[path] | {"stream": True}))
            await wait_until(lambda: service.pipeline.num_tokens == 3)
            service.pipeline.failure = PipelineError("stage 1 died")
            service.pipeline.release()
            return await call

    response = asyncio.run(main())
    assert response.status_code == 200
    *chunks, last = sse_chunks(response.text)
    assert chunks
    assert all("choices" in chunk for chunk in chunks)
    assert last == {
        "error": {
            "message": PipelineError.public_message,
            "type": "server_error",
            "param": None,
            "code": "engine_unavailable",
        }
    }


class RecitingService:
    """A service that gives every request the same lists of events, or raises one of them."""

    model_name = "demo/model"
    max_model_len = 128

    def __init__(self, tokenizer, *steps):
        self.tokenizer = tokenizer
        self._steps = steps

    async def generate(self, request):
        for step in self._steps:
            if isinstance(step, Exception):
                raise step
            yield [TokenEvent(request_id=request.request_id, **event) for event in step]

    async def check_ready(self):
        pass

    async def server_info(self):
        return {}


def recite(tokenizer, *steps, is_streamed=True):
    async def main():
        app = build_api(RecitingService(tokenizer, *steps))
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.post(CHAT_PATH, json=BODIES[CHAT_PATH] | {"stream": is_streamed})

    return asyncio.run(main())


@pytest.mark.parametrize(
    ("end", "message", "code"),
    [
        (ZeroDivisionError("secret"), "internal error", "server_error"),
        ([{"finish_reason": FinishReason.ERROR, "error": "lost"}], "lost", "engine_unavailable"),
        (
            [{"finish_reason": FinishReason.ABORT}],
            "the server ended the request early; send it again",
            "engine_unavailable",
        ),
    ],
)
def test_no_failure_looks_like_the_end_of_an_answer(tokenizer, end, message, code):
    token_id = tokenizer.encode("a")[0]
    *_, last = sse_chunks(recite(tokenizer, [{"token_id": token_id}], end).text)
    assert (last["error"]["message"], last["error"]["code"]) == (message, code)
    whole = recite(tokenizer, [{"token_id": token_id}], end, is_streamed=False)
    assert whole.status_code == (500 if code == "server_error" else 503)
    assert whole.json()["error"]["message"] == message


def test_tokens_that_came_together_are_one_event(tokenizer):
    tokens = [{"token_id": token_id} for token_id in tokenizer.encode("def f(x): return x")]
    ends = [{"token_id": max(tokenizer.stop_token_ids), "finish_reason": FinishReason.STOP}]
    role, text, finish, done = sse_chunks(recite(tokenizer, tokens, ends).text)
    assert text["choices"][0]["delta"]["content"] == "def f(x): return x"
    assert finish["choices"][0]["finish_reason"] == "stop"
    assert (role["choices"][0]["delta"]["role"], done) == ("assistant", "[DONE]")


@pytest.mark.parametrize("num_outputs", [1, 3])
def test_others_get_their_turn_between_the_pieces_of_a_stream_that_had_lagged(
    tokenizer, num_outputs
):
    """It finds all its tokens there, and a client that takes them as fast as they are sent."""
    token_ids = tokenizer.encode("def f(x): return x")
    step = [{"token_id": token_id} for token_id in token_ids]
    end = [{"finish_reason": FinishReason.LENGTH}]
    service = RecitingService(tokenizer, *[step] * 5, end)

    async def main():
        deltas = [
            text_deltas(
                index,
                service.generate(make_request(str(index))),
                tokenizer.new_detokenizer(()),
            )
            for index in range(num_outputs)
        ]
        merged = deltas[0] if num_outputs == 1 else merge_deltas(deltas)
        head = ResponseHead.new(
            model="m", is_chat=False, token_bytes=tokenizer.vocabulary.token_bytes
        )
        writer = ChunkWriter(head, UsageMeter([make_request()], 1))
        events = sse_events(anext(merged), merged, writer)
        num_turns, turns = 0, []

        async def another():
            nonlocal num_turns
            while True:
                num_turns += 1
                await asyncio.sleep(0)

        other = asyncio.create_task(another())
        async for event in events:
            turns += [num_turns] * ('"text":"def' in event)
        other.cancel()
        return turns

    turns = asyncio.run(main())
    assert len(turns) == 5 * num_outputs
    assert len(set(turns)) == len(turns)


def test_a_stop_string_wins_over_what_came_with_it(tokenizer):
    async def main():
        events = [{"token_id": token_id} for token_id in tokenizer.encode("one two three")]
        events.append({"finish_reason": FinishReason.LENGTH})
        service = RecitingService(tokenizer, events)
        request = GenerationRequest(request_id="a", prompt_token_ids=(5,), max_tokens=99)
        detokenizer = tokenizer.new_detokenizer((), StopRule(["two"]))
        return [delta async for delta in text_deltas(0, service.generate(request), detokenizer)]

    (delta,) = asyncio.run(main())
    assert (delta.text, delta.finish_reason) == ("one ", FinishReason.STOP)
    assert delta.num_tokens < len(tokenizer.encode("one two three"))


@pytest.mark.parametrize("is_begun", [True, False])
def test_closing_merged_outputs_closes_each_of_them(is_begun):
    closed = []

    async def output(index):
        try:
            while True:
                yield TextDelta(index, "x", (7,))
                if index == 2:
                    await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)
            closed.append(index)

    async def main():
        merged = merge_deltas([output(index) for index in range(3)])
        for _ in range(5 * is_begun):
            await anext(merged)
        await merged.aclose()
        assert sorted(closed) == ([0, 1, 2] if is_begun else [])

    asyncio.run(main())


def test_a_client_that_leaves_as_the_first_token_comes_leaves_nothing_running(tokenizer):
    is_closed = False

    async def deltas(leave):
        nonlocal is_closed
        try:
            await asyncio.sleep(0)
            leave()
            yield TextDelta(0, "def", (7,))
        finally:
            await asyncio.sleep(0)
            is_closed = True

    async def main():
        head = ResponseHead.new(
            model="m", is_chat=False, token_bytes=tokenizer.vocabulary.token_bytes
        )
        writer = ChunkWriter(head, UsageMeter([make_request()], 1))
        has_left = asyncio.Event()
        source = deltas(has_left.set)
        task = asyncio.create_task(stream_response(source, writer, None))
        await has_left.wait()
        while not task.done():
            task.cancel()  # again and again, as servers do
            await asyncio.sleep(0)
        assert task.cancelled()
        await wait_until(lambda: is_closed)

    asyncio.run(main())
