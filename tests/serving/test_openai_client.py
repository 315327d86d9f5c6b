"""OpenAI's own client gets what OpenAI would give it."""

import asyncio

import openai
import pytest

from tests.fakes import LocalService
from tests.serving.local_api import CHAT, openai_client

MODEL = LocalService.model_name
TEXT = "def add(a, b):\n    return a + b  # naïve €"


def run(tokenizer, scenario, text=TEXT, **options):
    async def main():
        async with openai_client(tokenizer, text, **options) as (service, client):
            return await scenario(service, client)

    return asyncio.run(main())


def test_a_chat_answer_is_the_models_text_with_exact_usage(tokenizer):
    async def scenario(service, client):
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT)
        return answer, service.requests[0]

    answer, request = run(tokenizer, scenario)
    (choice,) = answer.choices
    assert (choice.index, choice.message.role, choice.message.content) == (0, "assistant", TEXT)
    assert choice.finish_reason == "stop"
    assert request.prompt_token_ids == tuple(tokenizer.apply_chat_template(CHAT))
    num_output = len(tokenizer.encode(TEXT)) + 1  # The end token is paid for, too.
    assert answer.usage.prompt_tokens == len(request.prompt_token_ids)
    assert answer.usage.completion_tokens == num_output
    assert answer.usage.total_tokens == len(request.prompt_token_ids) + num_output
    assert (answer.object, answer.model) == ("chat.completion", MODEL)
    assert answer.id.startswith("chatcmpl-")


def test_a_chat_stream_adds_up_to_the_answer(tokenizer):
    async def scenario(_service, client):
        stream = await client.chat.completions.create(
            model=MODEL, messages=CHAT, stream=True, stream_options={"include_usage": True}
        )
        return [chunk async for chunk in stream]

    *chunks, last = run(tokenizer, scenario)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == TEXT
    assert [chunk.choices[0].finish_reason for chunk in chunks[:-1]] == [None] * (len(chunks) - 1)
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert last.choices == []
    assert last.usage.completion_tokens == len(tokenizer.encode(TEXT)) + 1
    assert len({(chunk.id, chunk.created, chunk.object) for chunk in [*chunks, last]}) == 1


def test_a_completion_continues_text_or_tokens(tokenizer):
    async def scenario(service, client):
        for prompt in ("def add", tokenizer.encode("def add")):
            answer = await client.completions.create(model=MODEL, prompt=prompt, max_tokens=100)
            assert (answer.choices[0].text, answer.choices[0].finish_reason) == (TEXT, "stop")
            assert answer.object == "text_completion"
        first, second = service.requests
        assert first.prompt_token_ids == second.prompt_token_ids

    run(tokenizer, scenario)


def test_a_completion_stream_adds_up_to_the_answer(tokenizer):
    async def scenario(_service, client):
        stream = await client.completions.create(
            model=MODEL, prompt="x", max_tokens=100, stream=True
        )
        return [chunk async for chunk in stream]

    chunks = run(tokenizer, scenario)
    assert "".join(chunk.choices[0].text for chunk in chunks) == TEXT
    assert chunks[-1].choices[0].finish_reason == "stop"
    assert all(chunk.usage is None for chunk in chunks)


PROMPTS = [["a", "b", "c"], [[5, 6], [7]], ["a", [7, 8]]]


@pytest.mark.parametrize("prompts", PROMPTS)
def test_each_of_several_prompts_gets_its_own_choice(tokenizer, prompts):
    async def scenario(_service, client):
        whole = await client.completions.create(model=MODEL, prompt=prompts, max_tokens=3)
        stream = await client.completions.create(
            model=MODEL,
            prompt=prompts,
            max_tokens=3,
            stream=True,
            stream_options={"include_usage": True},
        )
        return whole, [chunk async for chunk in stream]

    whole, (*chunks, last) = run(tokenizer, scenario)
    assert [choice.index for choice in whole.choices] == list(range(len(prompts)))
    assert whole.usage.completion_tokens == 3 * len(prompts)
    for choice in whole.choices:
        mine = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert "".join(part.text for part in mine) == choice.text != ""
        assert [part.finish_reason for part in mine if part.finish_reason] == ["length"]
    assert last.usage == whole.usage


def test_the_limit_of_tokens_ends_an_answer_with_length(tokenizer):
    async def scenario(_service, client):
        return await client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3)

    answer = run(tokenizer, scenario)
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 3
    assert answer.choices[0].message.content == tokenizer._backend.decode(
        tokenizer.encode(TEXT)[:3]
    )


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_stop_string_ends_an_answer_before_it_and_its_request_with_it(tokenizer, is_streamed):
    async def scenario(service, client):
        answer = await client.chat.completions.create(
            model=MODEL, messages=CHAT, stop=["turn a", "nowhere"], stream=is_streamed
        )
        text = answer.choices[0].message.content if not is_streamed else ""
        reason = answer.choices[0].finish_reason if not is_streamed else ""
        if is_streamed:
            choices = [chunk.choices[0] async for chunk in answer]
            text = "".join(choice.delta.content or "" for choice in choices)
            reason = choices[-1].finish_reason
        await service.until_idle()
        return text, reason, service.pipeline.num_tokens

    # Without an end of its own within the limit of tokens.
    text, reason, num_tokens = run(tokenizer, scenario, TEXT + " again" * 100)
    assert (text, reason) == ("def add(a, b):\n    re", "stop")
    assert num_tokens < 64


def test_tokens_are_counted_up_to_the_one_that_completes_a_stop_string(tokenizer):
    async def scenario(_service, client):
        return await client.chat.completions.create(model=MODEL, messages=CHAT, stop="turn")

    usage = run(tokenizer, scenario).usage
    ids = tokenizer.encode(TEXT)
    texts = [tokenizer._backend.decode(ids[:length]) for length in range(len(ids) + 1)]
    assert usage.completion_tokens == next(n for n, text in enumerate(texts) if "turn" in text)


def test_the_end_token_ends_nothing_when_it_is_ignored(tokenizer):
    async def scenario(_service, client):
        return await client.completions.create(
            model=MODEL, prompt="x", max_tokens=20, extra_body={"ignore_eos": True}
        )

    answer = run(tokenizer, scenario, text="hi")
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].text.startswith("hihi")
    assert answer.usage.completion_tokens == 20


def test_an_answer_may_be_sent_back_as_a_message(tokenizer):
    async def scenario(service, client):
        answer = await client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=4)
        message = answer.choices[0].message
        for spelled in (message, message.model_dump()):
            chat = [*CHAT, spelled, {"role": "user", "content": "again"}]
            await client.chat.completions.create(model=MODEL, messages=chat, max_tokens=4)
        return service.requests

    _, second, third = run(tokenizer, scenario)
    assert second.prompt_token_ids == third.prompt_token_ids


def test_the_model_is_listed_and_found_by_its_name(tokenizer):
    async def scenario(service, client):
        (listed,) = [model async for model in client.models.list()]
        found = await client.models.retrieve(MODEL)
        assert (listed, found.id, found.max_model_len) == (found, MODEL, service.max_model_len)
        with pytest.raises(openai.NotFoundError) as caught:
            await client.models.retrieve("other")
        assert (caught.value.code, caught.value.param) == ("model_not_found", "model")

    run(tokenizer, scenario)


def test_many_answers_at_once_do_not_mix(tokenizer):
    async def scenario(_service, client):
        async def ask(length):
            return await client.completions.create(model=MODEL, prompt="x", max_tokens=length)

        return await asyncio.gather(*(ask(length) for length in range(1, 33)))

    answers = run(tokenizer, scenario, text="x" * 100, max_model_len=256)
    for length, answer in enumerate(answers, 1):
        assert answer.usage.completion_tokens == length


@pytest.mark.parametrize(
    ("change", "error", "code"),
    [
        ({"model": "other"}, openai.NotFoundError, "model_not_found"),
        ({"temperature": 101}, openai.BadRequestError, "invalid_value"),
        ({"functions": [{"name": "f"}]}, openai.BadRequestError, "unsupported_parameter"),
        ({"extra_body": {"topk": 3}}, openai.BadRequestError, "unknown_parameter"),
        ({"max_tokens": 10_000}, openai.BadRequestError, "context_length_exceeded"),
    ],
)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_refusal_is_the_error_class_of_its_status(tokenizer, change, error, code, is_streamed):
    async def scenario(_service, client):
        request = {"model": MODEL, "messages": CHAT, "stream": is_streamed} | change
        with pytest.raises(error) as caught:
            await client.chat.completions.create(**request)
        assert caught.value.code == code

    run(tokenizer, scenario)
