"""`n` outputs of a prompt are n answers to it: each has a seed, and an index, of its own."""

import asyncio
from itertools import pairwise

import pytest
import torch

from gllm_ray.messages import MicroBatchResult
from gllm_ray.model.sampler import sample
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.local_api import BODIES, CHAT, openai_client

MODEL = LocalService.model_name
CHAT_PATH, COMPLETION_PATH = BODIES


class ComputingPipeline(ScriptedPipeline):
    """A pipeline whose next token is a function of the sequence's share of the micro-batch."""

    def __init__(self, next_token):
        super().__init__([])
        self._next_token = next_token

    async def next_result(self):
        await asyncio.sleep(0)
        batch = self._queue.popleft()
        token_ids = tuple(self._next_token(item) for item in batch.sequences if item.sampling)
        return MicroBatchResult(batch_id=batch.batch_id, token_ids=token_ids)


def last_token(item):
    return item.token_ids[-1]


def drawn_token(item):
    return sample(torch.zeros(1, 1000), [item.sampling], [item.end])[0]


def run(tokenizer, next_token, scenario):
    async def main():
        pipeline = ComputingPipeline(next_token)
        async with openai_client(tokenizer, "", pipeline=pipeline) as (service, client):
            return await scenario(service, client)

    return asyncio.run(main())


async def ask(client, path, **params):
    if path == CHAT_PATH:
        return await client.chat.completions.create(model=MODEL, messages=CHAT, **params)
    return await client.completions.create(model=MODEL, **({"prompt": "def f"} | params))


async def ask_streamed(client, path, **params):
    return [chunk async for chunk in await ask(client, path, stream=True, **params)]


def texts(answer):
    choices = answer.choices
    return [c.text if hasattr(c, "text") else c.message.content for c in choices]


def streamed_texts(chunks):
    """The text of each index that the stream names."""
    choices = [choice for chunk in chunks for choice in chunk.choices]
    pieces = {choice.index: [] for choice in choices}
    for choice in choices:
        text = choice.text if hasattr(choice, "text") else choice.delta.content
        pieces[choice.index].append(text or "")
    return ["".join(pieces[index]) for index in sorted(pieces)]


@pytest.mark.parametrize("path", BODIES)
def test_n_outputs_are_n_choices_of_a_prompt_paid_for_once(tokenizer, path):
    async def scenario(service, client):
        params = {"max_tokens": 5, "extra_body": {"ignore_eos": True}}
        one = await ask(client, path, **params)
        return one, await ask(client, path, n=3, **params), service.requests[1:]

    one, three, requests = run(tokenizer, drawn_token, scenario)
    assert [choice.index for choice in three.choices] == [0, 1, 2]
    assert len(set(texts(three))) == 3
    assert len({request.prompt_token_ids for request in requests}) == 1
    assert len({request.request_id for request in requests}) == 3
    assert one.usage.completion_tokens == 5
    assert three.usage.prompt_tokens == one.usage.prompt_tokens
    assert three.usage.completion_tokens == 15
    assert three.usage.total_tokens == one.usage.prompt_tokens + 15


@pytest.mark.parametrize("path", BODIES)
def test_streamed_outputs_take_turns_and_each_ends_once(tokenizer, path):
    params = {"n": 3, "max_tokens": 8, "seed": 5, "extra_body": {"ignore_eos": True}}

    async def scenario(_service, client):
        whole = await ask(client, path, **params)
        options = {"include_usage": True}
        return whole, await ask_streamed(client, path, stream_options=options, **params)

    whole, (*chunks, last) = run(tokenizer, drawn_token, scenario)
    assert streamed_texts(chunks) == texts(whole)
    assert last.usage == whole.usage
    indices = [chunk.choices[0].index for chunk in chunks]
    assert sum(a != b for a, b in pairwise(indices)) > 3
    for index in range(3):
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == index]
        reasons = [choice.finish_reason for choice in mine]
        assert reasons == [None] * (len(reasons) - 1) + ["length"]
        if path == CHAT_PATH:
            roles = [choice.delta.role for choice in mine]
            assert roles == ["assistant"] + [None] * (len(roles) - 1)


def test_the_outputs_of_a_prompt_stand_side_by_side_in_the_order_of_the_prompts(tokenizer):
    prompts = [[5, 40], [6, 41], [7, 42]]
    params = {"prompt": prompts, "n": 2, "max_tokens": 3}

    async def scenario(service, client):
        whole = await ask(client, COMPLETION_PATH, **params)
        chunks = await ask_streamed(client, COMPLETION_PATH, **params)
        return whole, chunks, service.requests

    whole, chunks, requests = run(tokenizer, last_token, scenario)
    expected = [tokenizer._backend.decode([prompt[-1]] * 3) for prompt in prompts for _ in range(2)]
    assert len(set(expected)) == 3
    assert texts(whole) == streamed_texts(chunks) == expected
    assert [choice.index for choice in whole.choices] == list(range(6))
    assert whole.usage.prompt_tokens == 6
    assert whole.usage.completion_tokens == 18
    assert [list(request.prompt_token_ids) for request in requests[:6:2]] == prompts


@pytest.mark.parametrize("path", BODIES)
def test_a_seed_fixes_every_output_and_the_first_of_n_is_that_of_one(tokenizer, path):
    async def scenario(_service, client):
        async def draw(seed, n):
            params = {"seed": seed, "n": n, "max_tokens": 6, "extra_body": {"ignore_eos": True}}
            return texts(await ask(client, path, **params))

        return [await draw(*args) for args in ((7, 4), (7, 4), (7, 1), (8, 4))]

    four, again, one, other = run(tokenizer, drawn_token, scenario)
    assert four == again
    assert four[:1] == one
    assert len({*four, *other}) == 8


@pytest.mark.parametrize("seed", [-(2**63), -1, 0, 2**63 - 1, None])
def test_the_seed_of_every_output_is_its_own_and_has_64_bits(tokenizer, seed):
    async def scenario(service, client):
        await ask(client, COMPLETION_PATH, seed=seed, n=128, max_tokens=1)
        return [request.sampling.seed for request in service.requests]

    seeds = run(tokenizer, last_token, scenario)
    assert len(set(seeds)) == 128
    assert all(-(2**63) <= value < 2**63 for value in seeds)
    assert seed in (seeds[0], None)


@pytest.mark.parametrize("path", BODIES)
def test_a_stop_string_ends_each_output_for_itself(tokenizer, path):
    params = {"n": 3, "max_tokens": 100, "stop": "e", "seed": 1, "extra_body": {"ignore_eos": True}}

    async def scenario(service, client):
        answer = await ask(client, path, **params)
        await service.until_idle()
        return answer

    answer = run(tokenizer, drawn_token, scenario)
    assert [choice.finish_reason for choice in answer.choices] == ["stop"] * 3
    assert len(set(texts(answer))) == 3
    assert not any("e" in text for text in texts(answer))
