"""The demo service over real HTTP, through the official client, against transformers."""

import asyncio
import time

import httpx
import openai
import pytest
import torch

QUESTION = "Write a function that adds two numbers."
CODE = "def read_lines(path):\n"


@pytest.fixture(scope="module")
def client(service):
    return openai.OpenAI(base_url=f"{service.base_url}/v1", api_key="unused", max_retries=0)


def chat(client, service, content=QUESTION, **options):
    options = {"max_tokens": 48, "temperature": 0} | options
    return client.chat.completions.create(
        model=service.model, messages=[{"role": "user", "content": content}], **options
    )


def test_two_stages_and_their_layers_are_reported(service):
    info = service.info()
    assert [stage["stage_id"] for stage in info["stages"]] == [0, 1]
    assert not any("node" in stage for stage in info["stages"])
    assert info["stages"][0]["last_layer"] == info["stages"][1]["first_layer"]
    assert info["num_blocks"] == min(stage["max_kv_blocks"] for stage in info["stages"])


def test_models_are_listed_and_found(client, service):
    assert [model.id for model in client.models.list()] == [service.model]
    assert client.models.retrieve(service.model).id == service.model
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("another")


def test_chat_answer_equals_transformers_greedy(client, service, truth):
    answer = chat(client, service)
    expected = truth.chat(QUESTION, 48)
    assert answer.choices[0].message.content == expected
    assert len(set(expected.split())) > 3
    num_prompt_tokens = len(truth.chat_ids(QUESTION))
    num_tokens = len(truth.generate(truth.chat_ids(QUESTION), 48))
    assert answer.usage.prompt_tokens == num_prompt_tokens
    assert answer.usage.completion_tokens == num_tokens
    assert answer.usage.total_tokens == num_prompt_tokens + num_tokens
    assert answer.choices[0].finish_reason == ("length" if num_tokens == 48 else "stop")


def test_streamed_chat_equals_the_whole_answer(client, service, truth):
    chunks = list(chat(client, service, stream=True, stream_options={"include_usage": True}))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == truth.chat(QUESTION, 48)
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens > 0
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert reasons[:-1] == [None] * (len(reasons) - 1)
    assert reasons[-1] in ("stop", "length")


def test_a_response_and_its_stream_equal_the_chat_answer(client, service, truth):
    body = {"model": service.model, "input": QUESTION, "max_output_tokens": 48, "temperature": 0}
    whole = client.responses.create(**body)
    assert whole.output_text == truth.chat(QUESTION, 48)
    assert whole.usage.input_tokens == len(truth.chat_ids(QUESTION))
    with client.responses.stream(**body) as stream:
        *events, last = stream
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert "".join(deltas) == last.response.output_text == whole.output_text
    assert last.response.status == whole.status
    assert last.type == f"response.{whole.status}"


def test_completion_equals_transformers_greedy(client, service, truth):
    answer = client.completions.create(
        model=service.model, prompt=CODE, max_tokens=40, temperature=0
    )
    assert answer.choices[0].text == truth.complete(CODE, 40)


def test_usage_tells_what_of_a_prompt_the_prefix_cache_had_and_none_for_another_salt(
    client, service
):
    def cached_tokens(end, salt="mine"):
        usage = client.completions.create(
            model=service.model,
            prompt=[*range(20, 60), *end],
            max_tokens=2,
            extra_body={"cache_salt": salt},
        ).usage
        assert usage.prompt_tokens == 40 + len(end)
        return usage.prompt_tokens_details.cached_tokens

    assert cached_tokens([5]) == 0
    assert cached_tokens([5]) == 40, "all but the last token, from which the next is drawn"
    assert cached_tokens([6]) == 32, "the full blocks of 16 tokens"
    assert cached_tokens([5], "another's") == 0


def test_a_long_prompt_is_scored_as_transformers_scores_it(client, service, truth):
    """More of it is told than what Ray carries in a message, and it is computed in chunks."""
    prompt = [5 + 13 * index % 900 for index in range(900)]
    answer = client.completions.create(
        model=service.model,
        prompt=prompt,
        max_tokens=1,
        temperature=0,
        echo=True,
        logprobs=1,
        extra_body={"prompt_logprobs": 20},
    )
    (choice,) = answer.choices
    with torch.inference_mode():
        rows = truth.model(torch.tensor([prompt])).logits[0, :-1].log_softmax(dim=-1)
    expected = rows.gather(-1, torch.tensor(prompt[1:])[:, None]).squeeze(-1).tolist()
    assert choice.logprobs.token_logprobs[0] is None
    near = pytest.approx(expected, abs=1e-2)
    assert choice.logprobs.token_logprobs[1:-1] == near
    told = [
        tokens[str(i)] for tokens, i in zip(choice.prompt_logprobs[1:], prompt[1:], strict=True)
    ]
    assert [each["logprob"] for each in told] == near
    assert all(len(tokens) >= 20 for tokens in choice.prompt_logprobs[1:])
    assert answer.usage.prompt_tokens_details.cached_tokens == 0


def test_several_greedy_outputs_share_the_prompt_and_are_equal(client, service, truth):
    answer = client.completions.create(
        model=service.model, prompt=CODE, max_tokens=12, temperature=0, n=3
    )
    assert [choice.index for choice in answer.choices] == [0, 1, 2]
    assert {choice.text for choice in answer.choices} == {truth.complete(CODE, 12)}


def test_stop_string_cuts_the_text_before_it(client, service, truth):
    whole = truth.chat(QUESTION, 48)
    stop = whole[7:12]
    answer = chat(client, service, stop=[stop])
    assert answer.choices[0].message.content == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage.completion_tokens < 48
    service.wait_until_idle()


def test_same_seed_same_text_and_other_seeds_other_text(client, service):
    def draw(seed):
        answer = client.completions.create(
            model=service.model, prompt="import ", seed=seed, temperature=1.0, max_tokens=16
        )
        return answer.choices[0].text

    assert draw(7) == draw(7)
    assert len({draw(seed) for seed in range(4)}) > 1


def test_ignore_eos_runs_to_the_limit(client, service):
    answer = chat(client, service, max_tokens=200, extra_body={"ignore_eos": True})
    assert answer.usage.completion_tokens == 200
    assert answer.choices[0].finish_reason == "length"


def test_32_concurrent_streams_each_get_their_own_answer(service, truth):
    prompts = [f"def function_{i}(value, count={i}):\n" for i in range(32)]

    async def stream(client, prompt):
        parts = await client.completions.create(
            model=service.model, prompt=prompt, max_tokens=16, temperature=0, stream=True
        )
        return "".join([part.choices[0].text async for part in parts])

    async def run():
        async with openai.AsyncOpenAI(
            base_url=f"{service.base_url}/v1", api_key="unused", max_retries=0
        ) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    assert asyncio.run(run()) == [truth.complete(prompt, 16) for prompt in prompts]
    assert service.wait_until_idle()["kv_utilization"] == 0


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_leaves_frees_its_blocks(service, stream):
    body = {
        "model": service.model,
        "prompt": CODE,
        "max_tokens": 900,
        "ignore_eos": True,
        "stream": stream,
    }
    url = f"{service.base_url}/v1/completions"

    async def leave():
        async with httpx.AsyncClient(timeout=30) as client:
            if stream:
                async with client.stream("POST", url, json=body) as response:
                    async for _ in response.aiter_lines():
                        break
            else:
                task = asyncio.create_task(client.post(url, json=body))
                await asyncio.to_thread(service.wait_until_busy)
                task.cancel()

    start = time.monotonic()
    asyncio.run(leave())
    load = service.wait_until_idle(timeout_s=5)
    assert load["kv_utilization"] == 0
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    ("options", "status", "param", "code"),
    [
        ({"model": "another"}, 404, "model", "model_not_found"),
        ({"temperature": 101}, 400, "temperature", "invalid_value"),
        ({"functions": [{"name": "f"}]}, 400, "functions", "unsupported_parameter"),
        ({"max_tokens": 5000}, 400, "messages", "context_length_exceeded"),
        ({"extra_body": {"beam_width": 4}}, 400, "beam_width", "unknown_parameter"),
    ],
)
def test_what_cannot_be_served_is_refused_by_name(client, service, options, status, param, code):
    with pytest.raises(openai.APIStatusError) as caught:
        client.chat.completions.create(
            **({"model": service.model, "messages": [{"role": "user", "content": "hi"}]} | options)
        )
    error = caught.value
    assert (error.status_code, error.param, error.code) == (status, param, code)


def test_the_request_id_of_the_client_comes_back_once(service):
    response = httpx.get(f"{service.base_url}/health", headers={"X-Request-Id": "my-id"})
    assert response.headers.get_list("x-request-id") == ["my-id"]


def test_a_request_without_an_id_gets_one_that_the_official_client_tells(client, service):
    answers = [chat(client, service, max_tokens=1) for _ in range(2)]
    assert all(answer._request_id for answer in answers)
    assert answers[0]._request_id != answers[1]._request_id


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_load_balancers_may_ask_for_the_head_alone(service, path):
    response = httpx.head(f"{service.base_url}{path}")
    assert (response.status_code, response.content) == (200, b"")
