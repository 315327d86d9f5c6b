"""What a response shows of its prompts, by OpenAI's own client over the demo model."""

import asyncio

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from gllm_ray.model.checkpoint import find_directory
from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import QWEN, copy_demo
from tests.fakes import LocalService
from tests.serving.demo_api import DEMO_MODEL, MAX_MODEL_LEN, ask_demo, start_demo_pipeline
from tests.serving.local_api import CHAT, local_api, openai_client

MODEL = LocalService.model_name
TEXT = "def add(a, b):\n    # naïve €, and <|end|> spelled out"
IDS = [300, 7, 41, 41, 260]
CALL = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


@pytest.fixture(scope="module")
def reference():
    """The log probabilities of every token after each of some tokens, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(
        find_directory(DEMO_MODEL), dtype=torch.float32
    ).eval()

    def log_probs(token_ids):
        with torch.inference_mode():
            return model(torch.tensor([token_ids])).logits[0].log_softmax(dim=-1)

    return log_probs


def spelled(tokenizer, token_id):
    """As both routes spell a token."""
    text = tokenizer.vocabulary.token_bytes(token_id)
    try:
        return text.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in text)


def near(value):
    return pytest.approx(value, abs=2e-3)


async def choices_of(client, prompt, *, is_streamed=False, **options):
    """The choices, put together from a stream or as they come; and the usage."""
    vllms = {"ignore_eos": True, "prompt_logprobs": options.pop("prompt_logprobs", None)}
    asked = {"model": MODEL, "prompt": prompt, "max_tokens": 6, "seed": 3, **options}
    if not is_streamed:
        answer = await client.completions.create(**asked, extra_body=vllms)
        return [choice.model_dump() for choice in answer.choices], answer.usage
    told = {"include_usage": True}
    stream = await client.completions.create(
        **asked, extra_body=vllms, stream=True, stream_options=told
    )
    choices = {}
    async for chunk in stream:
        for choice in (choice.model_dump() for choice in chunk.choices):
            whole = choices.setdefault(choice["index"], choice | {"text": "", "logprobs": None})
            whole["text"] += choice["text"]
            whole |= {name: choice.get(name) for name in ("finish_reason", "stop_reason")}
            if choice["logprobs"] is not None:
                whole["logprobs"] = whole["logprobs"] or {name: [] for name in choice["logprobs"]}
                for name, items in choice["logprobs"].items():
                    whole["logprobs"][name] += items
    return [choices[index] for index in sorted(choices)], chunk.usage


def check_logprobs(told, tokenizer, reference, token_ids, num):
    """Log probabilities that begin with the first token of all."""
    tokens = [spelled(tokenizer, token_id) for token_id in token_ids]
    assert told["tokens"] == tokens
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    rows = reference(token_ids)
    for index, token_id in enumerate(token_ids[1:], 1):
        row, top = rows[index - 1], told["top_logprobs"][index]
        assert told["token_logprobs"][index] == top[tokens[index]] == near(row[token_id].item())
        likely = {spelled(tokenizer, likely_id) for likely_id in row.topk(num).indices.tolist()}
        assert top.keys() == {tokens[index], *likely}


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("num", [0, 2])
def test_an_echo_is_scored_as_what_follows_it(tokenizer, pipeline, reference, num, n, is_streamed):
    prompts = [tokenizer.encode(TEXT), IDS, IDS[:1]]

    async def scenario(service, client):
        options = {"echo": True, "logprobs": num, "n": n, "is_streamed": is_streamed}
        texts = [TEXT, tokenizer.decode(IDS), tokenizer.decode(IDS[:1])]
        answers = [
            await choices_of(client, TEXT, **options),
            await choices_of(client, prompts, **options),
        ]
        asking = [request.num_prompt_logprobs for request in service.requests]
        assert asking == ([num] + [None] * (n - 1)) * 4, "a prompt is asked for once"
        return [([TEXT], answers[0]), (texts, answers[1])]

    for texts, (choices, usage) in ask_demo(tokenizer, pipeline, scenario, prefix_caching=True):
        assert len(choices) == n * len(texts)
        for choice in choices:
            prompt_text = texts[choice["index"] // n]
            prompt = prompts[choice["index"] // n]
            assert choice["text"].startswith(prompt_text)
            assert choice["finish_reason"] == "length"
            told = choice["logprobs"]
            output = [
                next(i for i in range(tokenizer.vocab_size) if spelled(tokenizer, i) == token)
                for token in told["tokens"][len(prompt) :]
            ]
            assert len(output) == 6
            check_logprobs(told, tokenizer, reference, [*prompt, *output], num)
            ends = tokenizer.text_offsets([*prompt, *output], choice["text"])
            assert told["text_offset"] == ends
        assert usage.prompt_tokens == sum(map(len, prompts[: len(texts)]))
        assert usage.completion_tokens == 6 * len(choices)


@pytest.mark.parametrize("is_streamed", [False, True])
def test_an_echo_without_log_probabilities_is_the_prompt_and_costs_nothing(
    tokenizer, pipeline, is_streamed
):
    async def scenario(service, client):
        options = {"n": 2, "temperature": 0.9, "is_streamed": is_streamed}
        plain, _ = await choices_of(client, [TEXT, "import "], **options)
        echoed, usage = await choices_of(client, [TEXT, "import "], echo=True, **options)
        assert all(request.num_prompt_logprobs is None for request in service.requests)
        assert usage.prompt_tokens_details.cached_tokens > 0
        return plain, echoed

    plain, echoed = ask_demo(tokenizer, pipeline, scenario, prefix_caching=True)
    for index, prompt in enumerate([TEXT, TEXT, "import ", "import "]):
        assert echoed[index]["text"] == prompt + plain[index]["text"]
        assert echoed[index]["logprobs"] is None


@pytest.mark.parametrize("is_streamed", [False, True])
@pytest.mark.parametrize("num", [None, 1])
def test_a_prompt_may_be_scored_and_not_continued(tokenizer, pipeline, reference, num, is_streamed):
    async def scenario(_, client):
        options = {"echo": True, "max_tokens": 0, "logprobs": num, "n": 2}
        return await choices_of(client, [IDS, TEXT], is_streamed=is_streamed, **options)

    choices, usage = ask_demo(tokenizer, pipeline, scenario)
    prompts = [IDS, IDS, tokenizer.encode(TEXT), tokenizer.encode(TEXT)]
    for choice, prompt in zip(choices, prompts, strict=True):
        assert choice["text"] == tokenizer.decode(prompt)
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", None)
        if num is None:
            assert choice["logprobs"] is None
        else:
            check_logprobs(choice["logprobs"], tokenizer, reference, prompt, num)
    assert usage.completion_tokens == 0
    assert usage.prompt_tokens == len(IDS) + len(prompts[-1])


@pytest.mark.parametrize("max_tokens", [0, 3])
def test_token_ids_are_those_of_the_output_and_an_echo_adds_none(tokenizer, pipeline, max_tokens):
    asked = {"model": MODEL, "prompt": IDS, "echo": True, "max_tokens": max_tokens, "seed": 1}
    asked["extra_body"] = {"return_token_ids": True, "ignore_eos": True}

    async def scenario(_, client):
        answer = await client.completions.create(**asked)
        stream = await client.completions.create(stream=True, **asked)
        return answer.choices[0], [chunk.choices[0] async for chunk in stream]

    whole, chunks = ask_demo(tokenizer, pipeline, scenario)
    assert whole.prompt_token_ids == chunks[0].prompt_token_ids == IDS
    assert len(whole.token_ids) == max_tokens
    told = [token_id for chunk in chunks for token_id in getattr(chunk, "token_ids", None) or ()]
    assert told == whole.token_ids
    assert whole.text == tokenizer.decode(IDS + whole.token_ids)
    assert "".join(chunk.text for chunk in chunks) == whole.text


def test_a_harness_finds_how_likely_a_continuation_is(tokenizer, pipeline, reference):
    """As lm-evaluation-harness asks, and reads what it gets."""
    contexts = [tokenizer.encode(text) for text in ("def f(x):\n    return", "import os\nimport")]
    continuations = [tokenizer.encode(text) for text in (" x", " sys\n")]

    async def scenario(_, client):
        answer = await client.completions.create(
            model=MODEL,
            prompt=[a + b for a, b in zip(contexts, continuations, strict=True)],
            max_tokens=1,
            logprobs=1,
            echo=True,
            temperature=0,
            seed=1234,
        )
        return answer.choices

    choices = ask_demo(tokenizer, pipeline, scenario)
    for choice, context, continuation in zip(choices, contexts, continuations, strict=True):
        scores = choice.logprobs.token_logprobs[len(context) : -1]
        rows = reference(context + continuation)[len(context) - 1 : -1]
        expected = [row[token_id].item() for row, token_id in zip(rows, continuation, strict=True)]
        assert scores == near(expected)
        tops = choice.logprobs.top_logprobs[len(context) : -1]
        is_greedy = all(score == max(top.values()) for score, top in zip(scores, tops, strict=True))
        assert is_greedy == (rows.argmax(dim=-1).tolist() == continuation)


def check_prompt_logprobs(shown, tokenizer, reference, prompt, num):
    assert shown[0] is None
    assert len(shown) == len(prompt)
    for tokens, token_id, row in zip(shown[1:], prompt[1:], reference(prompt), strict=False):
        order = row.argsort(descending=True).tolist()
        wanted = dict.fromkeys([token_id, *order[:num]])
        assert list(tokens) == [str(wanted_id) for wanted_id in wanted]
        for wanted_id in wanted:
            said = tokens[str(wanted_id)]
            assert said.keys() == {"logprob", "rank", "decoded_token"}
            assert said["logprob"] == near(row[wanted_id].item())
            assert said["rank"] == order.index(wanted_id) + 1
            assert said["decoded_token"] == spelled(tokenizer, wanted_id)


@pytest.mark.parametrize("num", [0, 4])
def test_the_choices_of_a_completion_tell_of_their_prompts(tokenizer, pipeline, reference, num):
    async def scenario(_, client):
        options = {"prompt_logprobs": num, "n": 2}
        plain = await choices_of(client, [TEXT, IDS, [5]], **options)
        # Each of the two asks for a number of its own.
        both = await choices_of(client, [TEXT, IDS, [5]], echo=True, logprobs=2, **options)
        return plain[0], both[0]

    prompts = [tokenizer.encode(TEXT), IDS, [5]]
    plain, both = ask_demo(tokenizer, pipeline, scenario)
    for choices in (plain, both):
        assert len(choices) == 6
        for choice in choices:
            shown, prompt = choice["prompt_logprobs"], prompts[choice["index"] // 2]
            check_prompt_logprobs(shown, tokenizer, reference, prompt, num)
    assert all(choice["logprobs"] is None for choice in plain)
    for choice in both:
        told, prompt = choice["logprobs"], prompts[choice["index"] // 2]
        told = {name: items[: len(prompt)] for name, items in told.items()}
        check_logprobs(told, tokenizer, reference, prompt, 2)


@pytest.mark.parametrize("options", [{}, {"n": 2}, {"logprobs": True, "top_logprobs": 1}])
def test_the_answer_to_a_chat_tells_of_its_prompt(tokenizer, pipeline, reference, options):
    async def scenario(_, client):
        extra = {"prompt_logprobs": 3}
        return await client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=4, extra_body=extra, **options
        )

    answer = ask_demo(tokenizer, pipeline, scenario)
    prompt = tokenizer.apply_chat_template(CHAT)
    check_prompt_logprobs(answer.prompt_logprobs, tokenizer, reference, prompt, 3)
    assert not any("prompt_logprobs" in choice.model_dump() for choice in answer.choices)


def test_an_answer_that_asks_for_none_has_none(tokenizer, pipeline):
    async def scenario(service, client):
        chat = await client.chat.completions.create(model=MODEL, messages=CHAT, max_tokens=3)
        text = await client.completions.create(model=MODEL, prompt="x", max_tokens=3)
        assert all(request.num_prompt_logprobs is None for request in service.requests)
        return [chat.model_dump(), text.model_dump()["choices"][0]]

    for told in ask_demo(tokenizer, pipeline, scenario):
        assert "prompt_logprobs" not in told


async def ask_for_many(service, client):
    async def ask(index):
        prompt = [5 + (7 * index + 13 * i) % 900 for i in range(70 + index)]
        options = {"echo": True, "logprobs": 2, "n": 2, "max_tokens": 40, "temperature": 1.0}
        choices, _ = await choices_of(client, prompt, is_streamed=index % 2, **options)
        return [choice["text"] for choice in choices], [choice["logprobs"] for choice in choices]

    answers = await asyncio.gather(*map(ask, range(6)))
    return answers, service.scheduler.load().num_preemptions


@pytest.mark.parametrize("ring", [False, True])
def test_preemptions_change_nothing_that_is_told_of_prompts(tokenizer, pipeline, ring):
    options = {"prefix_caching": True, "ring": ring}
    squeezed, num_preemptions = ask_demo(
        tokenizer, pipeline, ask_for_many, num_blocks=80, **options
    )
    roomy, none = ask_demo(tokenizer, pipeline, ask_for_many, **options)
    assert num_preemptions > 0
    assert none == 0
    for (texts, told), (other_texts, other_told) in zip(squeezed, roomy, strict=True):
        assert texts == other_texts
        for mine, other in zip(told, other_told, strict=True):
            assert mine["tokens"] == other["tokens"]
            assert mine["text_offset"] == other["text_offset"]
            assert mine["token_logprobs"][1:] == near(other["token_logprobs"][1:])
        assert told[0]["token_logprobs"][:70] == told[1]["token_logprobs"][:70]


def test_a_prompt_that_is_only_scored_leaves_room_for_a_token(tokenizer, pipeline):
    async def scenario(_, client):
        options = {"model": MODEL, "max_tokens": 0, "echo": True, "logprobs": 0}
        fits = await client.completions.create(prompt=[5] * (MAX_MODEL_LEN - 1), **options)
        assert len(fits.choices[0].logprobs.tokens) == MAX_MODEL_LEN - 1
        with pytest.raises(openai.BadRequestError, match="maximum context length is 256"):
            await client.completions.create(prompt=[5] * MAX_MODEL_LEN, **options)

    ask_demo(tokenizer, pipeline, scenario)


@pytest.mark.parametrize(
    ("options", "num_told", "param"),
    [
        ({"prompt": [[5] * 100] * 120, "echo": True, "logprobs": 20}, 252_000, None),
        ({"prompt": [[5] * 100] * 128, "echo": True, "logprobs": 20}, 268_800, "logprobs"),
        ({"prompt": [5] * 100, "n": 128, "prompt_logprobs": 20}, 268_800, "prompt_logprobs"),
        ({"prompt": [5] * 100, "n": 128, "prompt_logprobs": 19}, 256_000, None),
    ],
)
def test_no_more_is_told_of_prompts_than_a_response_may_hold(tokenizer, options, num_told, param):
    async def ask():
        async with local_api(tokenizer, "one") as (_, http):
            return await http.post("/v1/completions", json={"model": MODEL} | options, timeout=60)

    response = asyncio.run(ask())
    assert response.status_code == (200 if param is None else 400), response.text[:500]
    if param is not None:
        error = response.json()["error"]
        assert error["param"] == param
        assert f"asked for {num_told} log probabilities of prompts" in error["message"]


def test_a_stop_string_does_not_end_an_echo_and_counts_behind_it(tokenizer):
    async def main():
        async with openai_client(tokenizer, "one two three") as (_, client):
            options = {"model": MODEL, "prompt": "two", "echo": True, "logprobs": 0, "stop": " two"}
            return await client.completions.create(**options)

    (choice,) = asyncio.run(main()).choices
    assert (choice.text, choice.finish_reason) == ("twoone", "stop")


@pytest.mark.parametrize("said", ["no call", CALL, f"first {CALL}"])
def test_the_prompt_of_a_chat_with_tools_is_told_of(tmp_path, said):
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "qwen", QWEN, ()))

    async def main():
        room = {"max_model_len": 1024, "num_blocks": 2048}
        async with openai_client(tokenizer, said, **room) as (service, client):
            answer = await client.chat.completions.create(
                model=MODEL,
                messages=CHAT,
                tools=[{"type": "function", "function": {"name": "now"}}],
                extra_body={"prompt_logprobs": 1},
            )
            return answer, service.requests[0].prompt_token_ids

    answer, prompt = asyncio.run(main())
    assert bool(answer.choices[0].message.tool_calls) == (CALL in said)
    pairs = zip(answer.prompt_logprobs[1:], prompt[1:], strict=True)
    assert all(tokens[str(token_id)]["rank"] == token_id for tokens, token_id in pairs)
