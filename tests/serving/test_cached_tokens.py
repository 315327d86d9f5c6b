"""Usage tells how much of a prompt the prefix cache had, once for all outputs of the prompt."""

import asyncio

import pytest

from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.text_stream import TextDelta
from gllm_ray.serving.usage import UsageMeter
from tests.chat_templates import QWEN, copy_demo
from tests.factories import make_request
from tests.fakes import LocalService
from tests.replica_set import Fault, Replicas
from tests.serving.local_api import BODIES, CHAT, http_client, openai_client, openai_over
from tests.serving.test_front_end import RecitingPipeline, RemoteModel

MODEL = LocalService.model_name
CHAT_PATH, COMPLETION_PATH = BODIES
PROMPT = [*range(20, 31)]  # of two blocks of four tokens, and three


def run(tokenizer, scenario, **options):
    async def main():
        options_of_cache = {"prefix_caching": True, "max_model_len": 512} | options
        async with openai_client(tokenizer, "one two three", **options_of_cache) as (_, client):
            return await scenario(client)

    return asyncio.run(main())


async def usages(client, path=COMPLETION_PATH, *, continuous=False, **params):
    """What an answer tells of its cost, whole and streamed; all that is told with `continuous`."""
    create, body = client.completions.create, {"prompt": PROMPT}
    if path == CHAT_PATH:
        create, body = client.chat.completions.create, {"messages": CHAT}
    body |= {"model": MODEL, "max_tokens": 3} | params
    whole = (await create(**body)).usage
    options = {"include_usage": True, "continuous_usage_stats": continuous}
    chunks = [chunk async for chunk in await create(**body, stream=True, stream_options=options)]
    return [whole, *(chunk.usage for chunk in chunks if chunk.usage)]


def cached(usage):
    return usage.prompt_tokens_details and usage.prompt_tokens_details.cached_tokens


@pytest.mark.parametrize("path", BODIES)
def test_all_but_the_last_token_of_a_known_prompt_is_cached_and_nothing_of_another_salt(
    tokenizer, path
):
    async def scenario(client):
        salt = {"extra_body": {"cache_salt": "another"}}
        return [*await usages(client, path), *await usages(client, path, **salt)]

    first, again, *salted = run(tokenizer, scenario)
    assert [cached(first), cached(again)] == [0, first.prompt_tokens - 1]
    assert [cached(usage) for usage in salted] == [0, first.prompt_tokens - 1]


def test_without_prefix_caching_nothing_is(tokenizer):
    told = run(tokenizer, usages, prefix_caching=False)
    assert [cached(usage) for usage in told] == [0, 0]


@pytest.mark.parametrize("path", BODIES)
def test_what_outputs_of_a_prompt_share_among_them_is_not_cached(tokenizer, path):
    first, again = run(tokenizer, lambda client: usages(client, path, n=3))
    assert first.completion_tokens == again.completion_tokens == 9
    assert [cached(first), cached(again)] == [0, first.prompt_tokens - 1]


def test_of_several_prompts_it_is_the_sum(tokenizer):
    async def scenario(client):
        await usages(client)
        # Of the first eleven tokens less one, of the second the two blocks, of the third nothing.
        prompts = [PROMPT, [*PROMPT[:8], 5, 5], [7, 7, 7]]
        return [*await usages(client, prompt=prompts, n=2), *await usages(client, prompt=prompts)]

    told = run(tokenizer, scenario)
    assert [usage.prompt_tokens for usage in told] == [24] * 4
    assert [cached(usage) for usage in told] == [18, 21, 21, 21]


@pytest.mark.parametrize("path", BODIES)
def test_continuous_usage_tells_it_from_the_first_token_on(tokenizer, path):
    first, *told = run(tokenizer, lambda client: usages(client, path, continuous=True))
    num_silent = int(path == CHAT_PATH)  # the role comes before
    assert [usage.prompt_tokens_details for usage in told[:num_silent]] == [None] * num_silent
    assert len(told) > num_silent + 2
    assert {cached(usage) for usage in told[num_silent:]} == {first.prompt_tokens - 1}


def test_it_is_told_once_every_output_has_begun_and_is_the_least_that_one_found():
    requests = [make_request(str(index)) for index in range(4)]  # of eight tokens each
    meter, told = UsageMeter(requests, 2), []
    for index, found in [(1, 7), (1, None), (0, 4), (3, 0), (3, None), (2, 7), (0, None)]:
        meter.add(TextDelta(index, "x", (7,), num_cached_tokens=found))
        told.append(meter.usage()["prompt_tokens_details"])
    assert told == [None] * 5 + [{"cached_tokens": 4}] * 2
    assert meter.usage()["total_tokens"] == 16 + 7


def test_an_output_with_tool_calls_tells_it_too(tmp_path):
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "qwen", QWEN), tool_parser="auto")
    tools = [{"type": "function", "function": {"name": "now"}}]
    call = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'

    async def main():
        options = {"prefix_caching": True, "max_model_len": 1024, "num_blocks": 1024}
        for text in (call, f"So: {call}"):
            async with openai_client(tokenizer, text, **options) as (_, client):
                first, again = await usages(client, CHAT_PATH, tools=tools, max_tokens=100)
            assert [cached(first), cached(again)] == [0, first.prompt_tokens - 1]

    asyncio.run(main())


@pytest.mark.parametrize(("num_tokens", "told"), [(0, 10), (1, 0), (3, 0)])
def test_a_replica_that_takes_over_does_not_change_what_was_told(tokenizer, num_tokens, told):
    async def main():
        script = [*tokenizer.encode("one two three"), *tokenizer.stop_token_ids]
        lost = Fault(after=1 + num_tokens)
        options = {"num_blocks": 64, "prefix_caching": True}
        async with Replicas(
            lambda: RecitingPipeline(script, len(PROMPT)), [lost], **options
        ) as replicas:
            replicas.schedulers[1].add(make_request("known there", prompt=PROMPT, max_tokens=1))
            async with http_client(RemoteModel(MODEL, tokenizer, replicas)) as http:
                answer = await openai_over(http).completions.create(
                    model=MODEL, prompt=PROMPT, max_tokens=20
                )
            assert len(replicas.outputs) == 2
            assert replicas.outputs[1] == tuple(script[:num_tokens])
            return answer

    answer = asyncio.run(main())
    assert answer.choices[0].text == "one two three"
    assert cached(answer.usage) == told
