"""The Responses API, by OpenAI's own client; the model recites a text."""

import asyncio
import json
from functools import partial

import openai
import pytest

from gllm_ray.errors import PipelineError
from tests.fakes import LocalService
from tests.replica_set import Fault, Replicas
from tests.serving.demo_api import ask_demo, start_demo_pipeline
from tests.serving.local_api import (
    CHAT,
    http_client,
    local_api,
    openai_client,
    openai_over,
    wait_until,
)
from tests.serving.test_disconnect import MAX_TOKENS, Connection, leave
from tests.serving.test_front_end import RecitingPipeline, RemoteModel
from tests.serving.test_structured_output import Animal
from tests.serving.test_tool_calls import BARE, CALL, NOW, NOW_CALL, ROOM, TOOLS, WEATHER_CALL
from tests.serving.test_tool_calls import checkpoints as checkpoints
from tests.serving.test_tool_calls import qwen as qwen

PATH = "/v1/responses"
MODEL = LocalService.model_name
TEXT = "def add(a, b):\n    return a + b  # naïve €"
QUESTION = CHAT[0]["content"]
FLAT_TOOLS = [{"type": "function", **tool["function"]} for tool in TOOLS]
ASKED = {"model": MODEL, "input": QUESTION}
WITH_TOOLS = ASKED | {"tools": FLAT_TOOLS}
TERMINAL = ("response.completed", "response.incomplete", "response.failed")


def run(tokenizer, text, scenario, **options):
    async def main():
        async with openai_client(tokenizer, text, **ROOM | options) as (service, client):
            outcome = await scenario(service, client)
            await service.until_idle()
            return outcome

    return asyncio.run(main())


async def events_of(client, **body):
    return [event async for event in await client.responses.create(**body, stream=True)]


def without_ids(response):
    """All that does not differ between two answers to the same request."""
    fields = response.model_dump()
    for name in ("id", "created_at", "completed_at"):
        fields.pop(name)
    for item in fields["output"]:
        assert item.pop("id").startswith({"message": "msg_", "function_call": "fc_"}[item["type"]])
        if item["type"] == "function_call":
            assert item.pop("call_id").startswith("call_")
    return fields


def said(response):
    """The texts and the calls, in their order."""
    return [
        "".join(part.text for part in item.content)
        if item.type == "message"
        else (item.name, item.arguments)
        for item in response.output
    ]


def check_order(events):
    """The final response, which the events before it add up to."""
    assert [event.sequence_number for event in events] == list(range(len(events)))
    created, in_progress, *middle, last = events
    assert (created.type, in_progress.type) == ("response.created", "response.in_progress")
    for event in (created, in_progress):
        assert (event.response.status, event.response.output) == ("in_progress", [])
        assert event.response.id == last.response.id
    assert last.type in TERMINAL
    assert not {event.type for event in middle} & {*TERMINAL, "error"}
    for index, item in enumerate(last.response.output):
        check_item(item, [event for event in middle if event.output_index == index])
    # One item after the other, for only the last one grows.
    assert [event.output_index for event in middle] == sorted(
        event.output_index for event in middle
    )
    assert len({event.output_index for event in middle}) == len(last.response.output)
    return last.response


def check_item(item, events):
    kinds = [event.type.removeprefix("response.") for event in events]
    added, done = events[0].item, events[-1].item
    assert (added.id, added.type, added.status) == (item.id, item.type, "in_progress")
    assert done == item
    assert {event.item_id for event in events[1:-1]} <= {item.id}
    deltas = [event for event, kind in zip(events, kinds, strict=True) if kind.endswith(".delta")]
    grown = "".join(event.delta for event in deltas)
    growth = [*kinds[: -3 if item.type == "message" else -2]]
    if item.type == "function_call":
        assert growth == ["output_item.added"] + ["function_call_arguments.delta"] * len(deltas)
        assert kinds[-2:] == ["function_call_arguments.done", "output_item.done"]
        assert grown == events[-2].arguments == item.arguments
        assert (added.arguments, added.name) == ("", item.name)
        return
    begin = ["output_item.added", "content_part.added"]
    assert growth == begin + ["output_text.delta"] * len(deltas)
    assert kinds[-3:] == ["output_text.done", "content_part.done", "output_item.done"]
    (part,) = item.content
    assert grown == events[-3].text == events[-2].part.text == part.text
    assert (added.content, events[1].part.text) == ([], "")
    logprobs = [each.model_dump() for event in deltas for each in event.logprobs]
    assert logprobs == [each.model_dump() for each in part.logprobs]


def test_an_answer_is_the_models_text_with_exact_usage(tokenizer):
    async def scenario(service, client):
        answer = await client.responses.create(**ASKED)
        await client.chat.completions.create(model=MODEL, messages=CHAT)
        return answer, service.requests

    answer, (request, of_chat) = run(tokenizer, TEXT, scenario)
    assert (answer.output_text, answer.status, answer.error) == (TEXT, "completed", None)
    assert (answer.object, answer.model, answer.store) == ("response", MODEL, False)
    assert answer.id.startswith("resp_")
    (message,) = answer.output
    assert (message.role, message.status) == ("assistant", "completed")
    assert request.prompt_token_ids == of_chat.prompt_token_ids
    assert request.sampling.temperature == answer.temperature == of_chat.sampling.temperature
    usage = answer.usage
    assert usage.input_tokens == len(request.prompt_token_ids)
    assert usage.output_tokens == len(tokenizer.encode(TEXT)) + 1
    assert usage.total_tokens == usage.input_tokens + usage.output_tokens
    assert usage.input_tokens_details.cached_tokens == 0
    assert usage.output_tokens_details.reasoning_tokens == 0


def test_a_response_repeats_what_was_asked(tokenizer):
    schema = {"type": "object", "properties": {"a": {"const": None}}}
    text = {"format": {"type": "json_schema", "name": "it", "schema": schema, "strict": True}}
    asked = {"instructions": "naïve", "metadata": {"a": "€"}, "max_output_tokens": 3}
    asked |= {"temperature": 0.5, "top_p": 0.25, "user": "me", "text": text}
    asked |= {"tools": FLAT_TOOLS, "tool_choice": "none", "parallel_tool_calls": False}

    async def scenario(_, client):
        return await client.responses.create(**ASKED, **asked)

    told = run(tokenizer, "x", scenario).to_dict()
    tools = [
        {"description": None, "parameters": None, "strict": None} | tool for tool in FLAT_TOOLS
    ]
    assert {name: told[name] for name in asked} == asked | {"tools": tools}


def test_a_client_may_name_the_tool_that_is_called(qwen):
    async def scenario(_, client):
        choice = {"type": "function", "name": "now"}
        whole = await client.responses.create(**WITH_TOOLS, tool_choice=choice)
        return whole, check_order(await events_of(client, **WITH_TOOLS, tool_choice=choice))

    whole, streamed = run(qwen, "{}", scenario)
    assert whole.tool_choice.model_dump() == {"type": "function", "name": "now"}
    assert said(whole) == said(streamed) == [NOW_CALL]
    assert (whole.status, whole.output[0].status) == ("completed", "completed")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (TEXT, [TEXT]),
        ("", [""]),
        (CALL, [WEATHER_CALL]),
        (f"Let me see. {CALL}{NOW}", ["Let me see. ", WEATHER_CALL, NOW_CALL]),
        (f"a {CALL} b {NOW} c", ["a ", WEATHER_CALL, "b ", NOW_CALL, "c"]),
    ],
)
def test_a_stream_tells_of_each_item_in_order_and_adds_up_to_the_whole(qwen, text, expected):
    async def scenario(_, client):
        whole = await client.responses.create(**WITH_TOOLS)
        streamed = check_order(await events_of(client, **WITH_TOOLS))
        async with client.responses.stream(**WITH_TOOLS) as stream:
            return whole, streamed, await stream.get_final_response()

    whole, streamed, final = run(qwen, text, scenario)
    assert said(whole) == said(final) == expected
    assert without_ids(streamed) == without_ids(whole)
    assert whole.output_text == "".join(item for item in expected if isinstance(item, str))


@pytest.mark.parametrize("text", [TEXT, f"{NOW}{CALL}"])
def test_an_answer_that_the_limit_of_tokens_ends_is_incomplete(qwen, text):
    body = WITH_TOOLS | {"max_output_tokens": len(qwen.encode(text)) - 8}

    async def scenario(_, client):
        whole = await client.responses.create(**body)
        return whole, await events_of(client, **body)

    whole, events = run(qwen, text, scenario)
    assert events[-1].type == "response.incomplete"
    assert without_ids(check_order(events)) == without_ids(whole)
    assert (whole.status, whole.incomplete_details.reason) == ("incomplete", "max_output_tokens")
    *before, last = whole.output
    assert (last.type, last.status) == ("message", "incomplete")
    assert [item.status for item in before] == ["completed"] * len(before)
    assert text.removeprefix(NOW).startswith(last.content[0].text)


def test_a_call_that_the_limit_of_tokens_cuts_is_incomplete(qwen):
    body = WITH_TOOLS | {"tool_choice": {"type": "function", "name": "weather"}}
    body |= {"max_output_tokens": 4}

    async def scenario(_, client):
        return await client.responses.create(**body), await events_of(client, **body)

    whole, events = run(qwen, '{"city": "Kiruna"}', scenario)
    assert without_ids(check_order(events)) == without_ids(whole)
    (call,) = whole.output
    assert (call.type, call.status, whole.status) == ("function_call", "incomplete", "incomplete")
    assert '{"city": "Kiruna"}'.startswith(call.arguments)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_with_calls_goes_back_with_the_results_of_tools(qwen, is_streamed):
    async def answer_of(client, **body):
        if not is_streamed:
            return await client.responses.create(**body)
        async with client.responses.stream(**body) as stream:
            return await stream.get_final_response()

    async def scenario(service, client):
        answer = await answer_of(client, **WITH_TOOLS)
        _, call, now = answer.output
        results = [
            {"type": "function_call_output", "call_id": call.call_id, "output": "rain"},
            {
                "type": "function_call_output",
                "call_id": now.call_id,
                "output": [{"type": "input_text", "text": "noon"}],
            },
        ]
        asked = [{"role": "user", "content": QUESTION}]
        for output in (answer.output, [item.model_dump() for item in answer.output]):
            body = WITH_TOOLS | {"input": [*asked, *output, *results]}
            await client.responses.create(**body)
        calls = [
            {"id": item.call_id, "function": {"name": item.name, "arguments": item.arguments}}
            for item in (call, now)
        ]
        message = {"role": "assistant", "content": "a ", "tool_calls": calls}
        tools = [
            {"role": "tool", "tool_call_id": call.call_id, "content": "rain"},
            {"role": "tool", "tool_call_id": now.call_id, "content": "noon"},
        ]
        await client.chat.completions.create(
            model=MODEL, messages=[*CHAT, message, *tools], tools=TOOLS
        )
        return [request.prompt_token_ids for request in service.requests]

    first, second, third, of_chat = run(qwen, f"a {CALL}{NOW}", scenario)
    assert second == third == of_chat
    assert second[: len(first)] == first


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


def test_openais_client_parses_an_answer_into_a_model(tokenizer, pipeline):
    async def scenario(_, client):
        body = ASKED | {"text_format": Animal, "temperature": 0, "max_output_tokens": 90}
        whole = await client.responses.parse(**body)
        async with client.responses.stream(**body) as stream:
            events = [event async for event in stream]
        return whole, events

    whole, events = ask_demo(tokenizer, pipeline, scenario)
    assert isinstance(whole.output_parsed, Animal)
    assert Animal.model_validate_json(whole.output_text) == whole.output_parsed
    (done,) = [event for event in events if event.type == "response.output_text.done"]
    assert done.parsed == whole.output_parsed == events[-1].response.output_parsed


def test_log_probabilities_are_those_of_the_chat(tokenizer, pipeline):
    async def scenario(_, client):
        body = ASKED | {"temperature": 0, "max_output_tokens": 9, "top_logprobs": 2}
        body |= {"include": ["message.output_text.logprobs"]}
        whole = await client.responses.create(**body)
        streamed = check_order(await events_of(client, **body))
        chat = await client.chat.completions.create(
            model=MODEL, messages=CHAT, temperature=0, max_tokens=9, logprobs=True, top_logprobs=2
        )
        return whole, streamed, chat.choices[0].logprobs.content

    whole, streamed, expected = ask_demo(tokenizer, pipeline, scenario)
    for response in (whole, streamed):
        told = response.output[0].content[0].logprobs
        assert [each.token for each in told] == [each.token for each in expected]
        assert [each.bytes for each in told] == [each.bytes for each in expected]
        near = pytest.approx([each.logprob for each in expected], abs=1e-4)
        assert [each.logprob for each in told] == near
        assert [len(each.top_logprobs) for each in told] == [2] * 9


FAILURE = {
    "code": "server_error",
    "message": PipelineError.public_message,
    "type": "server_error",
    "param": None,
}


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_a_failure_in_a_stream_is_its_last_event_and_no_end(tokenizer, num_tokens):
    options = {"hold_after": num_tokens, "stream_keep_alive_s": 0.01}

    async def main():
        async with local_api(tokenizer, "abcdefgh", **options) as (service, http):
            call = asyncio.create_task(events_of(openai_over(http), **ASKED))
            await wait_until(lambda: service.requests and service.pipeline.num_tokens == num_tokens)
            await asyncio.sleep(0.1)  # past the wait for a status
            service.pipeline.failure = PipelineError("stage 1 died")
            service.pipeline.release()
            return await call

    events = asyncio.run(main())
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert [event.type for event in events[:2]] == ["response.created", "response.in_progress"]
    assert not {event.type for event in events[:-1]} & {*TERMINAL}
    failed = events[-1]
    assert (failed.type, failed.response.status) == ("response.failed", "failed")
    assert failed.response.error.model_dump(exclude_unset=True) == FAILURE
    assert [item.status for item in failed.response.output] == ["incomplete"] * bool(num_tokens)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_error_before_the_first_token_has_its_own_status(tokenizer, is_streamed):
    async def main():
        async with local_api(tokenizer, "abc", hold_after=0) as (service, http):
            call = asyncio.create_task(http.post(PATH, json=ASKED | {"stream": is_streamed}))
            await wait_until(lambda: service.requests)
            service.pipeline.failure = PipelineError("stage 1 died")
            service.pipeline.release()
            return await call

    response = asyncio.run(main())
    assert response.status_code == 503
    assert response.json()["error"]["message"] == PipelineError.public_message


def test_a_silent_stream_sends_comments_that_openais_client_does_not_see(tokenizer):
    options = {"hold_after": 3, "stream_keep_alive_s": 0.01}

    async def main():
        async with local_api(tokenizer, "abcdefgh", **options) as (service, http):
            loop = asyncio.get_running_loop()
            loop.call_later(0.2, service.pipeline.release)
            events = await events_of(openai_over(http), **ASKED)
            service.pipeline._released.clear()
            loop.call_later(0.2, service.pipeline.release)
            raw = await http.post(PATH, json=ASKED | {"stream": True})
            return events, raw.text

    events, raw = asyncio.run(main())
    assert check_order(events).output_text == "abcdefgh"
    assert raw.count(": keep-alive\n\n") > 1


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("hold_after", [0, 9])
def test_a_client_that_goes_away_gives_its_kv_blocks_back(tokenizer, is_streamed, hold_after):
    async def main():
        body = ASKED | {"stream": is_streamed, "max_output_tokens": MAX_TOKENS}
        connection = Connection(PATH, body)
        await leave(tokenizer, connection, hold_after, lambda call: call.cancel())

    asyncio.run(main())


@pytest.mark.parametrize("after", range(1, 40, 6))
def test_behind_a_front_end_an_output_goes_on_at_another_replica(qwen, after):
    text = f"a {CALL} b"
    script = [*qwen.encode(text), *qwen.stop_token_ids]
    body = ASKED | {"model": "org/two", "tools": FLAT_TOOLS}
    num_prompt_tokens = len(qwen.apply_chat_template(CHAT, BARE))

    async def ask(faults):
        pipelines = partial(RecitingPipeline, script, num_prompt_tokens)
        async with Replicas(pipelines, faults, **ROOM) as replicas:
            models = [RemoteModel(name, qwen, replicas) for name in ("one", "org/two")]
            for model in models:
                model.max_model_len = ROOM["max_model_len"]
            async with http_client(*models) as http:
                client = openai_over(http)
                with pytest.raises(openai.NotFoundError):
                    await client.responses.create(**body | {"model": "three"})
                response = check_order(await events_of(client, **body))
            return response, len(replicas.outputs)

    response, num_replicas = asyncio.run(ask(()))
    other, num_other = asyncio.run(ask((Fault(after=after),)))
    assert without_ids(other) == without_ids(response)
    assert said(response) == ["a ", WEATHER_CALL, "b"]
    assert (response.model, num_replicas, num_other) == ("org/two", 1, 2)


def test_each_event_is_named_and_any_text_survives(tokenizer):
    text = 'naïve € 😀\u2028"x"\\\r\n'

    async def main():
        async with local_api(tokenizer, text) as (_, http):
            return await http.post(PATH, json=ASKED | {"stream": True})

    response = asyncio.run(main())
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    *events, rest = response.text.split("\n\n")
    assert rest == ""
    pieces = []
    for event in events:
        name, data = event.split("\n")
        fields = json.loads(data.removeprefix("data: "))
        assert name == f"event: {fields['type']}"
        pieces.append(fields.get("delta", ""))
    assert "".join(pieces) == text
