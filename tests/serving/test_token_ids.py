"""The tokens of prompts and outputs, where a request asks for them, in the places that vLLM has."""

import asyncio
from itertools import chain

import pytest

from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import QWEN, copy_demo
from tests.fakes import LocalService
from tests.replica_set import Fault
from tests.serving.demo_api import ask_demo, start_demo_pipeline
from tests.serving.local_api import CHAT, openai_client, sse_chunks
from tests.serving.test_front_end import PROMPT, TEXT
from tests.serving.test_front_end import ask as ask_front_end

MODEL = LocalService.model_name
ASKED = {"return_token_ids": True}
PROMPTS = ["def add(a, b):\n", "import "]


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


async def streamed(stream):
    """Of each output the tokens of its prompt, and those of each of its chunks."""
    told = {}
    async for chunk in stream:
        (choice,) = chunk.choices
        is_first = choice.index not in told
        in_chat = getattr(chunk, "prompt_token_ids", None)
        prompt = getattr(choice, "prompt_token_ids", None) or in_chat
        assert (prompt is not None) == is_first
        if is_first:
            told[choice.index] = [prompt, []]
        told[choice.index][1].append(choice.token_ids)
    return [told[index] for index in sorted(told)]


def joined(parts):
    return list(chain.from_iterable(parts))


@pytest.mark.parametrize("logprobs", [{}, {"logprobs": 0}])
@pytest.mark.parametrize("ring", [False, True])
def test_each_choice_of_a_completion_has_its_prompts_and_its_own(
    tokenizer, pipeline, logprobs, ring
):
    async def scenario(service, client):
        asked = {"model": MODEL, "prompt": PROMPTS, "n": 2, "max_tokens": 9, "seed": 4}
        asked |= {"extra_body": ASKED, **logprobs}
        whole = await client.completions.create(**asked)
        return whole, await streamed(await client.completions.create(**asked, stream=True))

    whole, chunks = ask_demo(tokenizer, pipeline, scenario, ring=ring)
    assert whole.usage.completion_tokens == sum(len(choice.token_ids) for choice in whole.choices)
    for index, (choice, (prompt, parts)) in enumerate(zip(whole.choices, chunks, strict=True)):
        assert choice.prompt_token_ids == prompt == tokenizer.encode(PROMPTS[index // 2])
        assert choice.token_ids == joined(parts)
        assert tokenizer.decode(choice.token_ids).removesuffix("<|end|>") == choice.text
    assert not hasattr(whole, "prompt_token_ids")


def test_a_chat_has_its_prompts_once_and_each_choice_its_own(tokenizer, pipeline):
    async def scenario(_, client):
        asked = {"model": MODEL, "messages": CHAT, "n": 3, "max_tokens": 9, "seed": 4}
        whole = await client.chat.completions.create(**asked, extra_body=ASKED)
        stream = await client.chat.completions.create(**asked, extra_body=ASKED, stream=True)
        chunks = await streamed(stream)
        one = asked | {"n": 1, "extra_body": ASKED}
        async with client.chat.completions.stream(**one) as stream:
            merged = await stream.get_final_completion()
        return whole, chunks, merged.choices[0].message.content

    whole, chunks, merged = ask_demo(tokenizer, pipeline, scenario)
    assert merged == whole.choices[0].message.content
    assert whole.prompt_token_ids == tokenizer.apply_chat_template(CHAT)
    for choice, (prompt, parts) in zip(whole.choices, chunks, strict=True):
        assert prompt == whole.prompt_token_ids
        assert choice.token_ids == joined(parts)
        assert not hasattr(choice, "prompt_token_ids")
        text = tokenizer.decode(choice.token_ids).removesuffix("<|end|>")
        assert text == choice.message.content


@pytest.mark.parametrize("extra", [{}, {"return_token_ids": False}])
def test_who_does_not_ask_is_told_none(tokenizer, extra):
    async def main():
        async with openai_client(tokenizer, "abc") as (_, client):
            asked = {"model": MODEL, "prompt": "x", "extra_body": extra}
            whole = await client.completions.create(**asked)
            chunks = [
                chunk async for chunk in await client.completions.create(**asked, stream=True)
            ]
            return [whole, *chunks]

    for answer in asyncio.run(main()):
        for part in (answer, *answer.choices):
            assert not {"prompt_token_ids", "token_ids"} & part.model_dump().keys()


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("change", [{"stop": "very"}, {"logit_bias": None}], ids=str)
def test_what_is_no_text_of_the_output_is_told_too(tokenizer, is_streamed, change):
    """The tokens of a stop string, the one that ends the output, and those of half a character."""

    async def main():
        async with openai_client(tokenizer, TEXT) as (_, client):
            asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 100, **change}
            answer = await client.completions.create(**asked, extra_body=ASKED, stream=is_streamed)
            if is_streamed:
                ((prompt, parts),) = await streamed(answer)
                return prompt, joined(parts)
            return answer.choices[0].prompt_token_ids, answer.choices[0].token_ids

    prompt, output = asyncio.run(main())
    assert prompt == PROMPT
    said = [*tokenizer.encode(TEXT), *tokenizer.stop_token_ids]
    if "stop" in change:
        assert "very" in tokenizer.decode(output)
        assert "very" not in tokenizer.decode(output[:-1])
    assert output == said[: len(output) if "stop" in change else None]


def test_those_of_tool_calls_are_told_as_they_are_drawn(tmp_path):
    """Also while the text of a call is held back, and of calls that are dropped."""
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "qwen", QWEN))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    said = [*tokenizer.encode(f"a {call}{call} b"), *tokenizer.stop_token_ids]

    async def main():
        asked = {"model": MODEL, "messages": CHAT, "tools": tools, "extra_body": ASKED}
        async with openai_client(tokenizer, script=said, text="", max_model_len=512) as (_, client):
            for is_parallel in (True, False):
                asked |= {"parallel_tool_calls": is_parallel}
                whole = await client.chat.completions.create(**asked)
                stream = await client.chat.completions.create(**asked, stream=True)
                ((prompt, parts),) = await streamed(stream)
                assert whole.prompt_token_ids == prompt
                assert whole.choices[0].token_ids == said == joined(parts)
                assert sum(map(bool, parts)) > len(said) / 2
                assert len(whole.choices[0].message.tool_calls) == 1 + is_parallel

    asyncio.run(main())


@pytest.mark.parametrize("num_steps", [1, 4, 9])
def test_a_replica_that_is_lost_does_not_show(tokenizer, num_steps):
    """Behind a front end, in a stream and without."""
    said = [*tokenizer.encode(TEXT), *tokenizer.stop_token_ids]
    faults = [Fault(after=num_steps)]
    (choice,) = ask_front_end(tokenizer, faults, ASKED).json()["choices"]
    assert (choice["prompt_token_ids"], choice["token_ids"]) == (PROMPT, said)
    answer = ask_front_end(tokenizer, faults, ASKED | {"stream": True})
    choices = [chunk["choices"][0] for chunk in sse_chunks(answer.text)[:-1]]
    assert joined(choice["token_ids"] for choice in choices) == said
    assert [choice.get("prompt_token_ids") for choice in choices] == [
        PROMPT,
        *[None] * (len(choices) - 1),
    ]


def test_usage_chunks_are_as_they_are_without(tokenizer):
    options = {"include_usage": True, "continuous_usage_stats": True}

    async def main():
        async with openai_client(tokenizer, "abc def") as (_, client):
            asked = {"model": MODEL, "messages": CHAT, "stream": True, "stream_options": options}
            plain, told = [
                [chunk async for chunk in await client.chat.completions.create(**asked, **extra)]
                for extra in ({}, {"extra_body": ASKED})
            ]
        return [[chunk.usage for chunk in chunks] for chunks in (plain, told)], told

    (plain, usages), told = asyncio.run(main())
    assert usages[-1] == plain[-1]
    assert all(usage is not None for usage in usages)
    assert told[-1].choices == []
