"""Tool calls in what a model says, by OpenAI's own client; the model recites a text."""

import asyncio
import json

import openai
import pytest
from pydantic import ValidationError

from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.chat_messages import ChatMessage
from tests.chat_templates import LLAMA, QWEN, copy_demo
from tests.fakes import LocalService
from tests.replica_set import Fault, Replicas
from tests.serving.local_api import CHAT, http_client, openai_client, openai_over, sse_chunks
from tests.serving.test_front_end import RecitingPipeline, RemoteModel

MODEL = LocalService.model_name
ROOM = {"max_model_len": 1024, "num_blocks": 2048}
WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOLS = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER, "strict": True}},
    {"type": "function", "function": {"name": "now", "description": "Time.", "strict": True}},
]
ARGUMENTS = '{"city": "Köln €"}'
CALL = f'<tool_call>\n{{"name": "weather", "arguments": {ARGUMENTS}}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
JSON_CALL = f'{{"name": "weather", "parameters": {ARGUMENTS}}}'
MARKERS = ("<tool_call>", "</tool_call>", "<|python_tag|>")
PAID = {"include_usage": True}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """The demo's tokenizer with templates that know tools, by name."""
    directory = tmp_path_factory.mktemp("checkpoints")
    return {
        name: Tokenizer.load(copy_demo(directory / name, template, special), tool_parser=parser)
        for name, template, special, parser in (
            ("qwen", QWEN, (), "auto"),
            ("qwen, special", QWEN, MARKERS, "auto"),
            ("llama", LLAMA, (), "auto"),
            ("llama, special", LLAMA, MARKERS, "auto"),
            ("no parser", QWEN, (), "none"),
        )
    }


@pytest.fixture
def qwen(checkpoints):
    return checkpoints["qwen"]


def run(tokenizer, text, scenario, **options):
    async def main():
        async with openai_client(tokenizer, text, **ROOM | options) as (service, client):
            outcome = await scenario(service, client)
            await service.until_idle()
            return outcome

    return asyncio.run(main())


async def ask(client, *, is_streamed, **options):
    """The completion, whole or as OpenAI's client puts it together of its pieces."""
    body = {"model": MODEL, "messages": CHAT, "tools": TOOLS} | options
    if not is_streamed:
        return await client.chat.completions.create(**body)
    async with client.chat.completions.stream(**body, stream_options=PAID) as stream:
        return await stream.get_final_completion()


def said(choice):
    """The content, the calls and the finish reason."""
    message = choice.message
    assert message.content is not None or message.tool_calls
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content or "", calls, choice.finish_reason


def answers(tokenizer, text, **options):
    """What is said whole, which is also what is said in a stream, for the same tokens."""

    async def scenario(_, client):
        return [await ask(client, is_streamed=streamed, **options) for streamed in (False, True)]

    whole, streamed = run(tokenizer, text, scenario)
    assert whole.usage == streamed.usage
    assert [said(choice) for choice in whole.choices] == [
        said(choice) for choice in streamed.choices
    ]
    return [said(choice) for choice in whole.choices]


WEATHER_CALL, NOW_CALL = ("weather", ARGUMENTS), ("now", "{}")
SAID = [
    ("qwen", CALL, "", [WEATHER_CALL], "tool_calls"),
    ("qwen", f"Let me see.\n{CALL}", "Let me see.\n", [WEATHER_CALL], "tool_calls"),
    ("qwen", f"{CALL}\n{NOW}", "", [WEATHER_CALL, NOW_CALL], "tool_calls"),
    ("qwen", f"a {CALL} b {NOW} c", "a b c", [WEATHER_CALL, NOW_CALL], "tool_calls"),
    ("qwen", "Nothing < to <tool> do.", "Nothing < to <tool> do.", [], "stop"),
    ("qwen", "<tool_call>sorry</tool_call>", "<tool_call>sorry</tool_call>", [], "stop"),
    ("qwen", CALL.replace("weather", "other"), "", [("other", ARGUMENTS)], "tool_calls"),
    ("qwen", CALL.removesuffix("</tool_call>"), "", [WEATHER_CALL], "tool_calls"),
    ("llama", JSON_CALL, "", [WEATHER_CALL], "tool_calls"),
    ("llama", f"<|python_tag|>{JSON_CALL}; {JSON_CALL}", "", [WEATHER_CALL] * 2, "tool_calls"),
    ("llama", '{"answer": 42}', '{"answer": 42}', [], "stop"),
    ("llama", f"Here: {JSON_CALL}", f"Here: {JSON_CALL}", [], "stop"),
]


@pytest.mark.parametrize("is_special", [False, True])
@pytest.mark.parametrize(("name", "text", "content", "calls", "reason"), SAID)
def test_calls_are_told_apart_from_content_whether_or_not_markers_are_special_tokens(
    checkpoints, is_special, name, text, content, calls, reason
):
    tokenizer = checkpoints[f"{name}, special" if is_special else name]
    assert answers(tokenizer, text) == [(content, calls, reason)]


def test_each_call_has_an_id_and_an_index_and_content_keeps_its_place(qwen):
    async def scenario(_, client):
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, tools=TOOLS, stream=True
        )
        choices = [chunk.choices[0] async for chunk in stream]
        whole = await ask(client, is_streamed=False)
        return [choice.delta for choice in choices], whole.choices[0].message.tool_calls

    deltas, whole = run(qwen, f"a {CALL} b {NOW}{NOW} c", scenario)
    calls = [call for delta in deltas for call in delta.tool_calls or ()]
    assert [(call.index, call.type, call.function.name) for call in calls] == [
        (0, "function", "weather"),
        (1, "function", "now"),
        (2, "function", "now"),
    ]
    ids = [call.id for call in [*calls, *whole]]
    assert len(set(ids)) == 6
    assert all(id_.startswith("call_") and len(id_) > 20 for id_ in ids)
    order = "".join(
        "!" * len(delta.tool_calls) if delta.tool_calls else delta.content or "" for delta in deltas
    )
    assert order == "a !b !!c"


def test_an_answer_of_calls_alone_has_no_content(qwen):
    async def scenario(_, client):
        return await ask(client, is_streamed=False)

    message = run(qwen, CALL, scenario).choices[0].message
    assert message.content is None
    assert message.role == "assistant"
    assert [call.type for call in message.tool_calls] == ["function"]


def test_openais_client_tells_of_a_streamed_call_when_it_is_done(qwen):
    async def scenario(_, client):
        body = {"model": MODEL, "messages": CHAT, "tools": TOOLS}
        async with client.chat.completions.stream(**body) as stream:
            return [event async for event in stream]

    events = run(qwen, f"{CALL}{NOW}", scenario)
    done = [event for event in events if event.type == "tool_calls.function.arguments.done"]
    assert [(event.index, event.name, event.parsed_arguments) for event in done] == [
        (0, "weather", {"city": "Köln €"}),
        (1, "now", {}),
    ]


def test_a_call_that_the_limit_of_tokens_cuts_is_content(qwen):
    text = f"{NOW}{CALL}"
    num_tokens = len(qwen.encode(text)) - 8

    async def scenario(_, client):
        body = {"model": MODEL, "messages": CHAT, "tools": TOOLS, "max_tokens": num_tokens}
        stream = await client.chat.completions.create(**body, stream=True)
        return await ask(client, is_streamed=False, max_tokens=num_tokens), [
            chunk.choices[0] async for chunk in stream
        ]

    whole, choices = run(qwen, text, scenario)
    content, calls, reason = said(whole.choices[0])
    assert (calls, reason) == ([NOW_CALL], "length")
    assert CALL.startswith(content)
    assert content.startswith('<tool_call>\n{"name"')
    assert "".join(choice.delta.content or "" for choice in choices) == content
    assert sum(len(choice.delta.tool_calls or ()) for choice in choices) == 1
    assert choices[-1].finish_reason == "length"


def test_a_stop_string_ends_the_text_that_is_parsed(qwen):
    assert answers(qwen, f"{CALL}{NOW}", stop="</tool_call>") == [
        ("", [WEATHER_CALL], "tool_calls")
    ]
    assert answers(qwen, f"a{CALL}", stop="<tool_call>") == [("a", [], "stop")]
    cut = CALL[: CALL.index("Köln")]
    assert answers(qwen, f"{NOW}{CALL}", stop="Köln") == [(cut, [NOW_CALL], "tool_calls")]


def test_each_of_several_outputs_has_its_own_calls(qwen):
    async def scenario(_, client):
        whole = await ask(client, is_streamed=False, n=3)
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, tools=TOOLS, n=3, stream=True
        )
        return whole, [chunk.choices[0] async for chunk in stream]

    whole, choices = run(qwen, f"a{CALL}{NOW}", scenario)
    for choice in whole.choices:
        assert said(choice) == ("a", [WEATHER_CALL, NOW_CALL], "tool_calls")
        mine = [part.delta for part in choices if part.index == choice.index]
        calls = [call for delta in mine for call in delta.tool_calls or ()]
        assert [(call.index, call.function.name) for call in calls] == [(0, "weather"), (1, "now")]
    ids = {call.id for choice in whole.choices for call in choice.message.tool_calls}
    assert len(ids) == 6


BARE = [
    {"type": "function", "function": {"name": "weather", "parameters": WEATHER}},
    {"type": "function", "function": {"name": "now", "description": "Time."}},
]


async def with_replicas(tokenizer, text, faults, scenario):
    """What a scenario makes of a model whose replicas are lost, each after some tokens."""
    script = [*tokenizer.encode(text), *tokenizer.stop_token_ids]
    num_prompt_tokens = len(tokenizer.apply_chat_template(CHAT, BARE))
    replicas = Replicas(lambda: RecitingPipeline(script, num_prompt_tokens), faults, **ROOM)
    async with replicas:
        model = RemoteModel(MODEL, tokenizer, replicas)
        model.max_model_len = ROOM["max_model_len"]
        async with http_client(model) as http:
            return await scenario(replicas, http)


@pytest.mark.parametrize("name", ["qwen", "qwen, special"])
def test_log_probabilities_are_those_of_every_token_of_calls_too(checkpoints, name):
    tokenizer = checkpoints[name]
    text = f"a{NOW}{NOW}"

    async def scenario(_, http):
        client = openai_over(http)
        whole = await ask(client, is_streamed=False, logprobs=True)
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, tools=TOOLS, logprobs=True, stream=True
        )
        return whole, [chunk.choices[0] async for chunk in stream]

    whole, choices = asyncio.run(with_replicas(tokenizer, text, (), scenario))
    told = [token.token for token in whole.choices[0].logprobs.content]
    assert "".join(told).startswith(text)
    assert len(told) == whole.usage.completion_tokens
    streamed = [
        token.token for choice in choices if choice.logprobs for token in choice.logprobs.content
    ]
    assert streamed == told


def test_without_parallel_calls_the_first_one_counts(qwen):
    options = {"parallel_tool_calls": False}
    ((content, calls, reason),) = answers(qwen, f"a{CALL}b{NOW}c", **options)
    assert (content, calls, reason) == ("abc", [WEATHER_CALL], "tool_calls")


@pytest.mark.parametrize("is_streamed", [False, True])
def test_a_text_with_markers_is_a_text_where_no_tools_are_in_play(checkpoints, is_streamed):
    text = f"a{CALL}"
    hidden = text.replace("<tool_call>", "").replace("</tool_call>", "")
    for name, expected in (("qwen", text), ("qwen, special", hidden)):
        for options in ({"tools": openai.NOT_GIVEN}, {"tool_choice": "none"}):

            async def scenario(_, client, options=options):
                return await ask(client, is_streamed=is_streamed, **options)

            answer = run(checkpoints[name], text, scenario)
            assert said(answer.choices[0]) == (expected, [], "stop")


def prompts_of(tokenizer, *bodies):
    async def scenario(service, client):
        for body in bodies:
            await ask(client, is_streamed=False, **body)
        return [request.prompt_token_ids for request in service.requests]

    return run(tokenizer, "x", scenario)


def test_the_template_gets_the_tools_unless_it_knows_none(qwen, tokenizer):
    prompts = prompts_of(qwen, {}, {"tool_choice": "none"}, {"tools": []})
    expected = tuple(qwen.apply_chat_template(CHAT, BARE))
    assert prompts == [expected, expected, tuple(qwen.apply_chat_template(CHAT))]
    assert prompts_of(tokenizer, {"tool_choice": "none"}) == [
        tuple(tokenizer.apply_chat_template(CHAT))
    ]


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_answer_with_calls_goes_back_with_the_results_of_tools(qwen, is_streamed):
    async def scenario(service, client):
        answer = await ask(client, is_streamed=is_streamed)
        message = answer.choices[0].message
        call, now = message.tool_calls
        results = [
            {"role": "tool", "tool_call_id": call.id, "content": "rain", "name": "weather"},
            {
                "role": "tool",
                "tool_call_id": now.id,
                "content": [{"type": "text", "text": "noon"}],
            },
        ]
        calls = [
            {"index": number, "id": call.id, "function": {"name": call.function.name, **arguments}}
            for number, (call, arguments) in enumerate(
                [(call, {"arguments": call.function.arguments}), (now, {"arguments": ""})]
            )
        ]
        for spelled in (message, {"role": "assistant", "tool_calls": calls}):
            await ask(client, is_streamed=False, messages=[*CHAT, spelled, *results])
        return [request.prompt_token_ids for request in service.requests]

    _, first, second = run(qwen, f"{CALL}{NOW}", scenario)
    assert first == second
    text = qwen._backend.decode(list(first), skip_special_tokens=False)
    assert text.endswith(
        f"<|assistant|>\n{CALL}\n{NOW}<|end|>"
        "<|user|>\n<tool_response>\nrain\n</tool_response><|end|>"
        "<|user|>\n<tool_response>\nnoon\n</tool_response><|end|><|assistant|>"
    )


def call_with(arguments, **fields):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": arguments}}
    return [{"role": "assistant", "content": None, "tool_calls": [call | fields]}]


def test_a_call_with_a_mistake_is_the_only_mistake_of_its_message():
    with pytest.raises(ValidationError) as caught:
        ChatMessage.model_validate(call_with("{")[0])
    assert caught.value.error_count() == 1


def named(name):
    return {"type": "function", "function": {"name": name}}


def function(**fields):
    return {"type": "function", "function": {"name": "f"} | fields}


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return {"tools": [function(parameters=schema)]}


REFUSED = [
    (nested(101), "tools", "nested too deeply: the limit is 100 levels"),
    (nested(800) | {"tool_choice": "required"}, "tools", "nested too deeply"),
    ({"tools": [function(parameters={"enum": [0] * 300_000})]}, "tools", "262144 characters"),
    ({"tools": [function(name="a b")]}, "tools[0].function.name", "must match"),
    ({"tools": [function(name="a" * 65)]}, "tools[0].function.name", "must match"),
    ({"tools": [function(name="a\n")]}, "tools[0].function.name", "must match"),
    ({"tools": [function(), function()]}, "tools", "differ"),
    ({"tools": [function(name=f"f{i}") for i in range(129)]}, "tools", "at most 128"),
    ({"tools": [{"type": "custom", "custom": {"name": "f"}}]}, "tools[0].type", "function"),
    ({"tools": [function(parameters=[])]}, "tools[0].function.parameters", "must be an object"),
    (
        {"tools": [function(parameters={"type": "array"})]},
        "tools[0].function.parameters",
        '"type": "object"',
    ),
    ({"tools": [function(parameters={"enum": ["a" * 300_000]})]}, "tools", "262144 characters"),
    ({"tools": [function(description="a" * 300_000)]}, "tools", "262144 characters"),
    ({"tools": [function(other=1)]}, "tools[0].function.other", "not a known"),
    ({"tool_choice": "any"}, "tool_choice.type", "'required'"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "have a function"),
    ({"tool_choice": named("other")}, "tool_choice", "must name a function of tools"),
    ({"tool_choice": "required", "tools": []}, "tool_choice", "when there are tools"),
    ({"tool_choice": named("now"), "tools": None}, "tool_choice", "when there are tools"),
    ({"parallel_tool_calls": "yes"}, "parallel_tool_calls", "true or false"),
    (
        {"tool_choice": "required", "response_format": {"type": "json_object"}},
        "tool_choice",
        "tool_choice and response_format both constrain",
    ),
    (
        {"tool_choice": named("now"), "structured_outputs": {"regex": "a"}},
        "tool_choice",
        "tool_choice and structured_outputs both constrain",
    ),
    ({"tool_choice": "required", "ignore_eos": True}, "ignore_eos", "leave one of them out"),
    (
        {"tools": [function(parameters={"not": {}})], "tool_choice": "required"},
        "tool_choice",
        "Unimplemented keys",
    ),
    ({"messages": call_with("{")}, "messages[0].tool_calls[0].function.arguments", "JSON object"),
    ({"messages": call_with("[]")}, "messages[0].tool_calls[0].function.arguments", "JSON object"),
    (
        {"messages": call_with("[" * 10**5)},
        "messages[0].tool_calls[0].function.arguments",
        "JSON object",
    ),
    ({"messages": call_with('{"a": "\\ud800"}')}, "messages", "chat template refuses"),
    ({"messages": call_with("{}", id="")}, "messages[0].tool_calls[0].id", "1 or more"),
    ({"messages": call_with("{}", type="custom")}, "messages[0].tool_calls[0].type", "function"),
    (
        {"messages": call_with("{}") * 2 + call_with("{}", id=None)},
        "messages[2].tool_calls[0].id",
        "",
    ),
    (
        {"messages": [call_with("{}")[0] | {"role": "user", "content": "x"}]},
        "messages[0].tool_calls",
        "the assistant",
    ),
    ({"messages": [{"role": "assistant", "content": None}]}, "messages[0].content", "must be text"),
    (
        {
            "messages": [
                {"role": "assistant", "tool_calls": call_with("{}")[0]["tool_calls"] * 4097}
            ]
        },
        "messages",
        "at most 4096",
    ),
    ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].tool_call_id", "must have"),
    (
        {"messages": [{"role": "user", "content": "x", "tool_call_id": "1"}]},
        "messages[0].tool_call_id",
        "no other",
    ),
    ({"messages": [{"role": "tool", "tool_call_id": "1"}]}, "messages[0].content", "must be text"),
    ({"messages": call_with('{"a": "' + "b " * 10**5 + '"}')}, "messages", "characters in the"),
]


async def refusal(client, service, change):
    body = {"model": MODEL, "messages": CHAT, "tools": TOOLS} | change
    with pytest.raises(openai.BadRequestError) as caught:
        await client.post(
            "/chat/completions",
            options={"headers": {"Content-Type": "application/json"}},
            content=json.dumps(body).encode(),
            cast_to=object,
        )
    assert service.requests == []
    return caught.value


@pytest.mark.parametrize(("change", "param", "words"), REFUSED)
def test_what_cannot_be_done_is_refused_with_what_to_change(qwen, change, param, words):
    async def scenario(service, client):
        return await refusal(client, service, change)

    error = run(qwen, "x", scenario)
    assert error.param == param
    assert words in error.message


@pytest.mark.parametrize("choice", ["auto", "required", named("now"), None])
def test_tools_that_the_template_does_not_show_are_refused(tokenizer, choice):
    async def scenario(service, client):
        return await refusal(client, service, {"tool_choice": choice})

    error = run(tokenizer, "x", scenario)
    assert error.param == "tools"
    assert "leave tools out" in error.message


def test_calls_that_the_template_does_not_show_are_refused(tokenizer):
    async def scenario(service, client):
        return await refusal(client, service, {"tools": None, "messages": call_with("{}")})

    error = run(tokenizer, "x", scenario)
    assert error.param == "messages"
    assert "shows no tool_calls" in error.message


def test_a_model_whose_form_of_calls_is_not_known_may_be_made_to_call(checkpoints):
    tokenizer = checkpoints["no parser"]

    async def scenario(service, client):
        error = await refusal(client, service, {})
        assert error.param == "tool_choice"
        assert "model.tool_parser" in error.message
        return await ask(client, is_streamed=False, tool_choice=named("now"))

    assert said(run(tokenizer, "{}", scenario).choices[0]) == ("", [NOW_CALL], "stop")


@pytest.mark.parametrize("after", range(1, 40, 6))
@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_output_that_another_replica_ends_has_the_same_calls(qwen, is_streamed, after):
    text = f"a {CALL} b"

    async def scenario(replicas, http):
        body = {"model": MODEL, "messages": CHAT, "tools": TOOLS, "stream": is_streamed}
        answer = await http.post("/v1/chat/completions", json=body)
        return answer, len(replicas.outputs)

    def content_of(answer):
        if not is_streamed:
            return said_of(answer.json()["choices"][0], "message")
        *chunks, done = sse_chunks(answer.text)
        assert done == "[DONE]"
        return [said_of(chunk["choices"][0], "delta") for chunk in chunks]

    def said_of(choice, key):
        message = choice[key]
        for call in message.get("tool_calls", ()):
            assert call.pop("id").startswith("call_")
        return message, choice["finish_reason"]

    answer, num_replicas = asyncio.run(with_replicas(qwen, text, (), scenario))
    other, num_other = asyncio.run(with_replicas(qwen, text, (Fault(after=after),), scenario))
    assert content_of(other) == content_of(answer)
    assert (num_replicas, num_other) == (1, 2)
