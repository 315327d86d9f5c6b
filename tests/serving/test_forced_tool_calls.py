"""Calls that the demo model is made to make, by OpenAI's own client."""

import asyncio
import json
from typing import Literal

import jsonschema
import openai
import pytest
from pydantic import BaseModel, Field

from gllm_ray.config import parse_service_config
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.tool_schema import Tool, ToolChoice
from gllm_ray.serving.tool_use import ToolUse
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.chat_templates import QWEN, copy_demo
from tests.fakes import LocalService
from tests.serving.demo_api import BLOCK_SIZE, DEMO_MODEL, ask_demo
from tests.serving.local_api import CHAT

MODEL = LocalService.model_name
MAX_MODEL_LEN = 1024


class Pet(BaseModel):
    """A pet, which may have a smaller one."""

    kind: Literal["cat", "dog"]
    name: str = Field(max_length=6)
    friend: "Pet | None" = None


class Place(BaseModel):
    """Refers to a definition, as pydantic spells it."""

    pets: list[Pet] = Field(max_length=2)


class Pause(BaseModel):
    """Is soon complete."""

    seconds: Literal[1, 2]


TOOLS = [
    openai.pydantic_function_tool(Place, name="find"),
    {"type": "function", "function": {"name": "now"}},
    {
        "type": "function",
        "function": {"name": "wait", "parameters": {"properties": {"s": {"enum": [1, 2]}}}},
    },
]
PAUSE = openai.pydantic_function_tool(Pause)
SCHEMAS = {
    "find": TOOLS[0]["function"]["parameters"],
    "now": {"type": "object", "maxProperties": 0},
    "wait": {"type": "object", "properties": {"s": {"enum": [1, 2]}}},
}


def hermes(name, arguments):
    return f'<tool_call>\n{{"name": "{name}", "arguments": {arguments}}}\n</tool_call>'


def named(name):
    return {"type": "function", "function": {"name": name}}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("qwen") / "model", QWEN))


@pytest.fixture(scope="module")
def pipeline():
    return LocalPipeline.start(
        parse_service_config(
            {
                "model": {"path": DEMO_MODEL, "dtype": "float32", "max_model_len": MAX_MODEL_LEN},
                "pipeline": {"device": "cpu", "num_stages": 2},
                "kv_cache": {"kv_cache_bytes": "64MiB", "block_size": BLOCK_SIZE},
            }
        )
    )


def ask(tokenizer, pipeline, *, tools=TOOLS, scheduler=None, **options):
    """What is said whole, which is what is said in a stream: content, calls and finish reason."""

    async def scenario(service, client):
        body = {"model": MODEL, "messages": CHAT, "tools": tools, "max_tokens": 150} | options
        whole, stream = await asyncio.gather(
            *(client.chat.completions.create(**body, stream=stream) for stream in (False, True))
        )
        chunks = [chunk.choices[0] async for chunk in stream]
        return [said(choice) for choice in whole.choices], grown(chunks)

    room = {"max_model_len": MAX_MODEL_LEN}
    whole, streamed = ask_demo(tokenizer, pipeline, scenario, **room | (scheduler or {}))
    assert streamed == whole
    return whole


def said(choice):
    calls = [
        (call.function.name, call.function.arguments) for call in choice.message.tool_calls or ()
    ]
    return choice.message.content or "", calls, choice.finish_reason


def grown(chunks):
    """The same of the chunks of a stream; a call goes on where no other begins."""
    contents, calls, reasons = {}, {}, {}
    for chunk in chunks:
        contents[chunk.index] = contents.get(chunk.index, "") + (chunk.delta.content or "")
        mine = calls.setdefault(chunk.index, [])
        for call in chunk.delta.tool_calls or ():
            assert (call.id is None) == (call.function.name is None) == (call.type is None)
            if call.id is not None:
                mine.append((call.function.name, ""))
            assert call.index == len(mine) - 1
            name, arguments = mine[-1]
            mine[-1] = (name, arguments + call.function.arguments)
        reasons[chunk.index] = chunk.finish_reason
    return [(contents[index], calls[index], reasons[index]) for index in sorted(contents)]


def check(calls):
    for name, arguments in calls:
        jsonschema.validate(json.loads(arguments), SCHEMAS[name])


@pytest.mark.parametrize("name", SCHEMAS)
@pytest.mark.parametrize("ring", [False, True])
def test_a_function_that_has_to_be_called_is_with_arguments_that_match(
    tokenizer, pipeline, name, ring
):
    outputs = ask(
        tokenizer,
        pipeline,
        tool_choice=named(name),
        n=3,
        seed=3,
        max_tokens=150,
        scheduler={"ring": ring},
    )
    assert len(outputs) == 3
    assert any(reason == "stop" for *_, reason in outputs)
    for content, calls, reason in outputs:
        assert content == ""
        assert [called for called, _ in calls] == [name]
        if reason == "stop":
            check(calls)


def test_if_a_call_is_required_there_is_one_or_more_of_any_of_the_tools(tokenizer, pipeline):
    outputs = ask(tokenizer, pipeline, tool_choice="required", n=12, seed=1)
    ended = [(content, calls) for content, calls, reason in outputs if reason == "tool_calls"]
    assert len(ended) >= 5
    assert all(reason in ("tool_calls", "length") for *_, reason in outputs)
    for content, calls in ended:
        assert content == ""
        assert calls
        check(calls)
    assert {name for _, calls in ended for name, _ in calls} == set(SCHEMAS)
    assert max(len(calls) for _, calls in ended) > 1


def test_without_parallel_calls_exactly_one_is_required(tokenizer, pipeline):
    options = {"tool_choice": "required", "parallel_tool_calls": False}
    outputs = ask(tokenizer, pipeline, n=4, seed=1, **options)
    ended = [calls for _, calls, reason in outputs if reason == "tool_calls"]
    assert ended
    assert all(len(calls) == 1 for calls in ended)
    call = {"name": "now", "parameters": {}}
    for is_parallel in (True, False):
        tools = [Tool.model_validate(TOOLS[1])]
        use = ToolUse(tools, ToolChoice(type="required"), is_parallel=is_parallel)
        matcher = tokenizer.grammars.compile(use.grammar().grammar)
        assert matcher.consume_tokens(tokenizer.encode(json.dumps([call, call]))) == is_parallel


@pytest.mark.parametrize(
    ("key", "reference"),
    [("$defs", "#/$defs/n"), ("definitions", "#/definitions/n"), ("$defs", "#small")],
)
def test_schemas_refer_to_parts_of_themselves_wherever_they_stand(tokenizer, key, reference):
    parameters = {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "$id": "https://example.org/tree",
        "type": "object",
        "properties": {
            "n": {"$ref": reference},
            "tree": {"$ref": "#"},
            "text": {"const": {"$ref": "#/no/reference"}},
        },
        "required": ["n"],
        "additionalProperties": False,
        key: {"n": {"$anchor": "small", "enum": [1, 2]}},
    }
    function = {"name": "grow", "parameters": parameters}
    other = {
        "name": "cut",
        "parameters": parameters | {key: {"n": {"$anchor": "small", "enum": [3]}}},
    }
    tools = [Tool.model_validate({"type": "function", "function": it}) for it in (function, other)]
    use = ToolUse(tools, ToolChoice(type="required"), is_parallel=True)
    matcher = tokenizer.grammars.compile(use.grammar().grammar)
    for name, n, is_valid in (("grow", 1, True), ("cut", 3, True), ("grow", 3, False)):
        tree = {"n": n, "tree": {"n": n}, "text": {"$ref": "#/no/reference"}}
        calls = [{"name": name, "parameters": {"n": n, "tree": tree}}]
        follower = matcher.deep_copy()
        assert follower.consume_tokens(tokenizer.encode(json.dumps(calls))) == is_valid
        assert follower.is_accepting() == is_valid


def test_what_the_limit_of_tokens_leaves_of_calls_is_told(tokenizer, pipeline):
    ((content, calls, reason),) = ask(
        tokenizer, pipeline, tool_choice=named("find"), max_tokens=4, temperature=0
    )
    assert (content, reason) == ("", "length")
    assert calls[0][0] == "find"
    assert calls[0][1].startswith("{")
    ((content, calls, reason),) = ask(
        tokenizer, pipeline, tool_choice="required", max_tokens=4, temperature=0
    )
    assert (calls, reason) == ([], "length")
    assert content.startswith("[")


@pytest.mark.parametrize(
    ("choice", "content", "calls"),
    [
        (
            "So:\n" + hermes("wait", '{"s": 1}') + "\n" + hermes("now", "{}"),
            "So:\n",
            [("wait", '{"s": 1}'), ("now", "{}")],
        ),
        ("No <tool> is of use.", "No <tool> is of use.", []),
    ],
)
def test_a_model_that_decides_to_call_tools_does(tokenizer, pipeline, choice, content, calls):
    wanted = {"structured_outputs": {"choice": [choice]}}
    reason = "tool_calls" if calls else "stop"
    for options in ({}, {"tool_choice": "auto"}, {"n": 2}):
        outputs = ask(tokenizer, pipeline, extra_body=wanted, **options)
        assert outputs == [(content, calls, reason)] * options.get("n", 1)


def test_openais_client_parses_the_arguments_into_a_model(tokenizer, pipeline):
    async def scenario(_, client):
        body = {"model": MODEL, "messages": CHAT, "tools": [PAUSE], "max_tokens": 300}
        body |= {"tool_choice": "required", "parallel_tool_calls": False, "seed": 2}
        answer = await client.chat.completions.parse(**body)
        async with client.chat.completions.stream(**body) as stream:
            streamed = await stream.get_final_completion()
        return answer.choices[0].message, streamed.choices[0].message

    whole, streamed = ask_demo(tokenizer, pipeline, scenario, max_model_len=MAX_MODEL_LEN)
    for message in (whole, streamed):
        (call,) = message.tool_calls
        assert isinstance(call.function.parsed_arguments, Pause)
    assert whole.tool_calls[0].function.arguments == streamed.tool_calls[0].function.arguments
