"""What the Responses API takes: the same as the chat's route in other words, or a refusal."""

import asyncio
import json
import typing

import openai
import pytest
from openai.types.responses.response_create_params import (
    ResponseCreateParamsNonStreaming as ResponseParams,
)

from gllm_ray.serving.responses_request import ResponsesRequest
from tests.fakes import LocalService
from tests.serving.local_api import CHAT, local_api
from tests.serving.test_parameters import OURS, VLLMS_OF_BOTH
from tests.serving.test_responses import ASKED, FLAT_TOOLS, PATH
from tests.serving.test_responses import checkpoints as checkpoints
from tests.serving.test_responses import qwen as qwen
from tests.serving.test_tool_calls import ROOM, TOOLS

MODEL = LocalService.model_name
CHAT_PATH = "/v1/chat/completions"
LOGPROBS = ["message.output_text.logprobs"]
TEXT = {"type": "input_text", "text": ""}


async def post(http, path, body):
    # In ASCII, so that half of a surrogate pair can be spelled.
    headers = {"Content-Type": "application/json"}
    return await http.post(path, content=json.dumps(body), headers=headers)


def requests_of(tokenizer, *bodies, text="x"):
    """The token requests that bodies, each with the path of its route, become."""

    async def main():
        async with local_api(tokenizer, text, **ROOM) as (service, http):
            for path, body in bodies:
                response = await post(http, path, {"model": MODEL, **body})
                assert response.status_code == 200, response.text
            return service.requests

    return asyncio.run(main())


def refusal_of(tokenizer, change):
    async def main():
        async with local_api(tokenizer, "x", **ROOM) as (service, http):
            response = await post(http, PATH, ASKED | change)
            assert service.requests == []
            return response

    response = asyncio.run(main())
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error


def same(tokenizer, body, chat):
    """Check that a body asks for the same as one of the chat's route."""
    bodies = [(PATH, {"seed": 1} | body), (CHAT_PATH, {"seed": 1} | chat)]
    mine, of_chat = requests_of(tokenizer, *bodies)
    for field in ("prompt_token_ids", "max_tokens", "sampling", "stop_token_ids", "cache_salt"):
        assert getattr(mine, field) == getattr(of_chat, field), field
    for field in ("priority", "tenant", "expected_output_tokens", "queue_timeout_s"):
        assert getattr(mine, field) == getattr(of_chat, field), field
    return mine


def user(content):
    return {"role": "user", "content": content}


def call_item(call_id="1", name="weather", arguments="{}"):
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def output_item(call_id="1", output="rain"):
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def call(call_id="1", name="weather", arguments="{}"):
    return {"id": call_id, "function": {"name": name, "arguments": arguments}}


def tool(call_id="1", content="rain"):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


PARTS = [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}]
ANSWER = {"type": "message", "id": "msg_1", "status": "completed", "role": "assistant"}
ANSWER |= {"content": [{"type": "output_text", "text": "b", "annotations": [], "logprobs": []}]}
INPUTS = [
    ("hi", [user("hi")]),
    ([user("hi")], [user("hi")]),
    ([{"type": "message"} | user(PARTS)], [user("ab")]),
    (
        [{"role": "developer", "content": "a"}, user("b"), {"role": "system", "content": "c"}],
        [{"role": "system", "content": "a"}, user("b"), {"role": "system", "content": "c"}],
    ),
    ([user("a"), ANSWER, user("c")], [user("a"), {"role": "assistant", "content": "b"}, user("c")]),
    (
        [user("a"), ANSWER, {"role": "assistant", "content": "c"}],
        [user("a"), {"role": "assistant", "content": "b"}, {"role": "assistant", "content": "c"}],
    ),
    (
        [user("a"), call_item(), call_item("2"), output_item(), output_item("2", PARTS)],
        [
            user("a"),
            {"role": "assistant", "tool_calls": [call(), call("2")]},
            tool(),
            tool("2", "ab"),
        ],
    ),
    (
        [user("a"), ANSWER, call_item(), ANSWER, output_item(), ANSWER],
        [
            user("a"),
            {"role": "assistant", "content": "bb", "tool_calls": [call()]},
            tool(),
            {"role": "assistant", "content": "b"},
        ],
    ),
]


@pytest.mark.parametrize(("items", "messages"), INPUTS)
def test_an_input_is_the_conversation_of_a_chat(qwen, items, messages):
    same(qwen, {"input": items}, {"messages": messages})


def test_instructions_are_the_first_message_of_the_system(qwen):
    told = {"role": "system", "content": "be brief"}
    same(qwen, {"input": "hi", "instructions": "be brief"}, {"messages": [told, user("hi")]})
    same(qwen, {"input": "hi", "instructions": ""}, {"messages": [user("hi")]})


@pytest.mark.parametrize("status", ["incomplete", "in_progress"])
def test_an_answer_that_was_cut_is_continued_where_it_comes_last(qwen, status):
    items, cut = [user("a"), ANSWER], ANSWER | {"status": status}
    messages = [user("a"), {"role": "assistant", "content": "b"}]
    same(qwen, {"input": [user("a"), cut]}, {"messages": messages, "continue_final_message": True})
    same(qwen, {"input": items}, {"messages": messages})
    same(qwen, {"input": [user("a"), cut, user("c")]}, {"messages": [*messages, user("c")]})
    called = {"role": "assistant", "content": "b", "tool_calls": [call()]}
    same(qwen, {"input": [user("a"), call_item(), cut]}, {"messages": [user("a"), called]})


SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]}
FORMAT = {"type": "json_schema", "name": "it", "schema": SCHEMA, "strict": True}
OPTIONS = [
    ({"max_output_tokens": 7}, {"max_tokens": 7}),
    ({"text": {"format": {"type": "text", "name": None}, "verbosity": "medium"}}, {}),
    ({"text": {"format": {"type": "json_object"}}}, {"response_format": {"type": "json_object"}}),
    (
        {"text": {"format": FORMAT}},
        {
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "it", "schema": SCHEMA, "strict": True},
            }
        },
    ),
    ({"include": LOGPROBS}, {"logprobs": True}),
    ({"include": LOGPROBS, "top_logprobs": 3}, {"logprobs": True, "top_logprobs": 3}),
    ({"tools": FLAT_TOOLS}, {"tools": TOOLS}),
    ({"tools": FLAT_TOOLS, "tool_choice": "none"}, {"tools": TOOLS, "tool_choice": "none"}),
    (
        {"tools": FLAT_TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
        {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False},
    ),
    (
        {"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "now"}},
        {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "now"}}},
    ),
]


@pytest.mark.parametrize(("options", "of_chat"), OPTIONS)
def test_an_option_is_that_of_the_chat(qwen, options, of_chat):
    same(qwen, {"input": "hi"} | options, {"messages": [user("hi")]} | of_chat)


# What is taken in the same words, and is to be seen before there is an output.
SHARED = {
    "temperature": 0.5,
    "top_p": 0.5,
    "top_k": 5,
    "min_p": 0.1,
    "seed": 7,
    "stop_token_ids": [7],
    "allowed_token_ids": [*range(20, 60)],
    "bad_words": ["no"],
    "min_tokens": 2,
    "ignore_eos": True,
    "presence_penalty": 0.5,
    "frequency_penalty": 0.5,
    "repetition_penalty": 1.5,
    "logit_bias": {"5": 1},
    "cache_salt": "salt",
    "user": "me",
    "priority": 3,
    "expected_output_tokens": 9,
    "queue_timeout_s": 60.0,
}


def test_parameters_of_the_same_name_reach_the_engine(qwen):
    plain, request = requests_of(
        qwen, (PATH, {"input": "hi"}), (PATH, {"input": "hi"} | SHARED | {"max_output_tokens": 9})
    )
    same(qwen, {"input": "hi"} | SHARED, {"messages": [user("hi")]} | SHARED)
    assert request.sampling != plain.sampling
    assert (request.tenant, request.priority, request.cache_salt) == ("me", 3, "salt")


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"stop": "b"}, "a"),
        ({"stop": ["b"], "include_stop_str_in_output": True}, "ab"),
        ({"skip_special_tokens": False, "include_stop_str_in_output": True}, "abc<|end|>"),
    ],
)
def test_parameters_of_the_same_name_reach_the_text(qwen, options, text):
    async def main():
        async with local_api(qwen, "abc", **ROOM) as (_, http):
            return (await post(http, PATH, ASKED | options)).json()

    assert asyncio.run(main())["output"][0]["content"][0]["text"] == text


def test_a_template_is_told_how_much_to_think_in_one_way(tokenizer, qwen):
    for change, param in [
        ({"reasoning": {"effort": "low"}}, "reasoning.effort"),
        ({"chat_template_kwargs": {"reasoning_effort": "low"}}, "chat_template_kwargs"),
        (
            {"reasoning": {"effort": "low"}, "chat_template_kwargs": {"reasoning_effort": "low"}},
            "chat_template_kwargs",
        ),
    ]:
        assert refusal_of(qwen, change)["param"] == param


OFFICIAL = set(typing.get_type_hints(ResponseParams)) | {"stream"}
OWN = OURS | VLLMS_OF_BOTH.keys() | {"chat_template_kwargs"}
# Of the other routes, whose clients may keep a habit.
FOREIGN = {"max_tokens", "n", "response_format", "presence_penalty", "frequency_penalty"}
FOREIGN |= {"logit_bias", "stop", "seed"}
VLLMS_OWN = {
    "echo": (False, True),
    "enable_response_messages": (False, True),
    "mm_processor_kwargs": ({}, {"num_crops": 4}),
    "previous_input_messages": (None, [{"role": "user"}]),
    "previous_response": (None, {"id": "resp_1"}),
    "prompt_logprobs": (None, 1),
    "return_token_ids": (False, True),
}
HONOURED_HERE = {"metadata"}
REQUESTS_FOR_MORE = {
    "access_programs": (None, {"cyber": "standard"}),
    "background": (False, True),
    "context_management": ([], [{"type": "compaction"}]),
    "conversation": (None, "conv_1"),
    "image": (None, {"context_compression": "auto"}),
    "max_tokens": (None, 5),
    "max_tool_calls": (None, 3),
    "moderation": (None, {"model": "m"}),
    "n": (1, 2),
    "previous_response_id": (None, "resp_1"),
    "prompt": (None, {"id": "pmpt_1"}),
    "prompt_cache_key": ("", "key"),
    "prompt_cache_options": (None, {"ttl": "30m"}),
    "prompt_cache_retention": (None, "24h"),
    "response_format": (None, {"type": "json_object"}),
    "safety_identifier": ("", "me"),
    "service_tier": ("auto", "priority"),
    "store": (False, True),
    "truncation": ("disabled", "auto"),
}
UNSUPPORTED = {
    name: values for name, values in VLLMS_OF_BOTH.items() if name not in HONOURED_HERE
} | VLLMS_OWN
UNSUPPORTED |= REQUESTS_FOR_MORE


def test_the_schema_knows_exactly_openais_parameters_and_our_own():
    assert set(ResponsesRequest.model_fields) == OFFICIAL | OWN | FOREIGN | VLLMS_OWN.keys()


def test_what_asks_for_nothing_is_accepted(tokenizer):
    neutral = {name: value for name, (value, _) in UNSUPPORTED.items()}
    neutral |= {"include": [], "tools": [], "tool_choice": "auto", "metadata": {}, "text": {}}
    neutral |= {"reasoning": {"effort": None, "context": "auto"}, "top_logprobs": 0}
    null = dict.fromkeys(ResponsesRequest.model_fields.keys() - {"input", "model"})
    plain, *others = requests_of(
        tokenizer,
        *[(PATH, ASKED | {"seed": 1} | values) for values in ({}, neutral)],
        (PATH, ASKED | null),
    )
    for request in others:
        assert request.prompt_token_ids == plain.prompt_token_ids
        assert request.max_tokens == plain.max_tokens
    assert others[0].sampling == plain.sampling


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_is_not_supported_is_refused_by_name(tokenizer, name):
    error = refusal_of(tokenizer, {name: UNSUPPORTED[name][1]})
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")
    assert f"{name}" in error["message"]
    assert "not supported" in error["message"]


@pytest.mark.parametrize("name", sorted(ResponsesRequest.model_fields))
def test_nonsense_is_refused_by_name(tokenizer, name):
    error = refusal_of(tokenizer, {name: {"nonsense": [True]}})
    assert error["param"].split(".")[0] == name


def nested(depth):
    schema = {}
    for _ in range(depth):
        schema = {"items": schema}
    return schema


IMAGE = {"type": "input_image", "image_url": "x"}
REFUSED = [
    ({"input": []}, "input", "1 or more"),
    ({"input": 7}, "input", "text or a list of items"),
    ({"input": ["hi"]}, "input[0]", "an object"),
    ({"input": [user("hi"), {"role": "user"}]}, "input[1].content", "required"),
    ({"input": [user("hi"), user(7)]}, "input[1].content", "text or a list"),
    ({"input": [{"role": "tool", "content": "x"}]}, "input[0].role", "'assistant'"),
    ({"input": [user([IMAGE])]}, "input[0].content[0].type", "'input_image'"),
    ({"input": [user([TEXT, {"type": "input_file"}])]}, "input[0].content[1].type", "input_text"),
    ({"input": [user("\ud800")]}, "input[0].content[0].text", "Unicode"),
    ({"input": "\ud800"}, "input[0].content[0].text", "Unicode"),
    ({"input": [{"type": "reasoning", "summary": []}]}, "input[0].type", "not 'reasoning'"),
    ({"input": [{"type": "item_reference", "id": "1"}]}, "input[0].type", "'function_call'"),
    ({"input": [{"type": ["message"]}]}, "input[0].type", "'message'"),
    ({"input": [call_item(arguments="[]")]}, "input[0].arguments", "JSON object"),
    ({"input": [call_item() | {"namespace": "n"}]}, "input[0].namespace", "not supported"),
    ({"input": [output_item(call_id=None)]}, "input[0].call_id", "text"),
    ({"input": [output_item(output=[IMAGE])]}, "input[0].output[0].type", "'input_image'"),
    ({"input": [user("a")] * 4097}, "input", "4096"),
    ({"input": [output_item(output=[TEXT] * 4097)]}, "input", "4096"),
    ({"instructions": "\ud800"}, "instructions", "Unicode"),
    ({"include": ["reasoning.encrypted_content"]}, "include[0]", "output_text.logprobs"),
    ({"top_logprobs": 2}, "top_logprobs", "include"),
    ({"top_logprobs": 21, "include": LOGPROBS}, "top_logprobs", "20"),
    ({"include": LOGPROBS, "tools": FLAT_TOOLS}, "include", "tools"),
    ({"max_output_tokens": 0}, "max_output_tokens", "at least 1"),
    ({"max_output_tokens": 5000}, "input", "context length"),
    ({"max_output_tokens": 2, "min_tokens": 3}, "min_tokens", "raise max_output_tokens"),
    ({"stream_options": {"include_obfuscation": False}}, "stream_options", "stream is true"),
    (
        {"stream": True, "stream_options": {"include_obfuscation": True}},
        "stream_options.include_obfuscation",
        "not supported",
    ),
    ({"metadata": {"a": 1}}, "metadata.a", "text"),
    ({"metadata": {"a": "b" * 513}}, "metadata.a", "512"),
    ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "16"),
    ({"reasoning": {"summary": "auto"}}, "reasoning.summary", "not supported"),
    ({"text": {"verbosity": "low"}}, "text.verbosity", "not supported"),
    ({"text": {"format": {"type": "json_schema"}}}, "text.format", "a name and a schema"),
    ({"text": {"format": {"type": "text", "name": "a"}}}, "text.format", "nothing but its type"),
    ({"text": {"format": FORMAT | {"schema": {"type": "no"}}}}, "text.format", "Invalid type: no"),
    ({"text": {"format": FORMAT | {"schema": nested(400)}}}, "text.format", "too deeply"),
    ({"tools": [FLAT_TOOLS[0] | {"parameters": nested(400)}]}, "tools", "too deeply"),
    (
        {"text": {"format": FORMAT}, "structured_outputs": {"regex": "a"}},
        "structured_outputs",
        "text.format and structured_outputs both",
    ),
    (
        {"text": {"format": FORMAT}, "tools": FLAT_TOOLS, "tool_choice": "required"},
        "tool_choice",
        "tool_choice and text.format both",
    ),
    ({"tools": [{"type": "web_search"}]}, "tools[0].type", "not 'web_search'"),
    ({"tools": TOOLS}, "tools[0].name", "required"),
    ({"tools": FLAT_TOOLS[:1] * 2}, "tools", "differ from each other"),
    ({"tools": FLAT_TOOLS[:1] * 129}, "tools", "128"),
    ({"tools": [FLAT_TOOLS[0] | {"defer_loading": True}]}, "tools[0].defer_loading", "supported"),
    ({"tool_choice": "required"}, "tool_choice", "there are tools"),
    ({"tool_choice": "any"}, "tool_choice.type", "'required'"),
    ({"tool_choice": {"type": "function"}}, "tool_choice", "must have a name"),
    ({"tool_choice": {"type": "auto", "name": "now"}}, "tool_choice", "only then"),
    ({"tool_choice": {"type": "allowed_tools"}}, "tool_choice.type", "'allowed_tools'"),
    (
        {"tools": FLAT_TOOLS, "tool_choice": {"type": "function", "name": "other"}},
        "tool_choice",
        "name a function of tools",
    ),
    ({"chat_template_kwargs": {"a": []}}, "chat_template_kwargs.a", "must be a number"),
    ({"chat_template_kwargs": {"a": 1}}, "chat_template_kwargs", "does not look at 'a'"),
    ({"messages": CHAT}, "messages", "not a known parameter"),
    ({"logprobs": True}, "logprobs", "not a known parameter"),
]


@pytest.mark.parametrize(("change", "param", "words"), REFUSED)
def test_what_cannot_be_is_refused_by_the_names_of_this_api(qwen, change, param, words):
    error = refusal_of(qwen, change)
    assert error["param"] == param
    assert words in error["message"]


def test_a_model_that_sees_no_tools_refuses_them(tokenizer):
    assert refusal_of(tokenizer, {"tools": FLAT_TOOLS})["param"] == "tools"
    items = [user("a"), call_item(), output_item()]
    error = refusal_of(tokenizer, {"input": items})
    assert error["param"] == "input"
    assert "shows no tool_calls to the model; leave such items out" in error["message"]


def test_what_json_cannot_repeat_is_refused_and_what_utf_8_cannot_is_escaped(tokenizer):
    def asked(schema):
        tools = [{"type": "function", "name": "f", "parameters": schema}]
        return {"tools": tools, "tool_choice": "none"}

    error = refusal_of(tokenizer, asked({"default": float("nan")}))
    assert "a number that JSON does not know" in error["message"]

    async def main():
        async with local_api(tokenizer, "x") as (_, http):
            return await post(http, PATH, ASKED | asked({"title": "\ud800"}))

    response = asyncio.run(main())
    assert response.json()["tools"][0]["parameters"] == {"title": "\ud800"}


def test_a_stored_response_is_told_to_be_nowhere(tokenizer):
    async def main():
        async with local_api(tokenizer, "x") as (_, http):
            return await http.get(f"{PATH}/resp_1")

    response = asyncio.run(main())
    assert response.status_code == 404
    assert "is not served" in response.json()["error"]["message"]


def test_a_refusal_is_the_error_class_of_its_status(tokenizer):
    async def main():
        async with local_api(tokenizer, "x") as (_, http):
            client = openai.AsyncOpenAI(
                api_key="x", base_url="http://test/v1", http_client=http, max_retries=0
            )
            with pytest.raises(openai.BadRequestError):
                await client.responses.create(**ASKED, background=True)
            with pytest.raises(openai.NotFoundError) as caught:
                await client.responses.create(**ASKED | {"model": "other"}, stream=True)
            return caught.value

    assert asyncio.run(main()).code == "model_not_found"
