"""Penalties, biases, and where outputs end, by OpenAI's own client over the demo model."""

import json

import openai
import pytest
import torch
from transformers import AutoModelForCausalLM

from gllm_ray.model.checkpoint import find_directory
from gllm_ray.model.generation_config import SamplingDefaults
from gllm_ray.model.tokenizer import Tokenizer
from tests.fakes import LocalService
from tests.serving.demo_api import DEMO_MODEL, ask_demo, start_demo_pipeline
from tests.serving.local_api import BODIES, CHAT

MODEL = LocalService.model_name
PROMPT = "def add(a, b):\n"
VLLMS = {"repetition_penalty", "min_tokens", "stop_token_ids", "include_stop_str_in_output"}
VLLMS |= {"ignore_eos", "allowed_token_ids", "bad_words", "structured_outputs"}


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


async def complete(client, prompt=PROMPT, **options):
    """The text, finish reason and number of tokens of each choice, streamed and not."""
    vllms = {name: options.pop(name) for name in VLLMS & options.keys()}
    asked = {"temperature": 0, "max_tokens": 24, **options}
    asked |= {"model": MODEL, "prompt": prompt, "logprobs": 0, "extra_body": vllms}
    answer = await client.completions.create(**asked)
    outputs = [[choice.text, choice.finish_reason, 0] for choice in answer.choices]
    for choice, output in zip(answer.choices, outputs, strict=True):
        output[2] = len(choice.logprobs.tokens)
    streamed = [["", None, 0] for _ in outputs]
    async for chunk in await client.completions.create(stream=True, **asked):
        (choice,) = chunk.choices
        output = streamed[choice.index]
        output[0] += choice.text
        output[1] = choice.finish_reason
        output[2] += len(choice.logprobs.tokens) if choice.logprobs else 0
    assert streamed == outputs
    return [tuple(output) for output in outputs]


def ask(tokenizer, pipeline, *args, scheduler=None, **options):
    async def scenario(_, client):
        return await complete(client, *args, **options)

    return ask_demo(tokenizer, pipeline, scenario, **(scheduler or {}))


def ask_one(*args, **options):
    (output,) = ask(*args, **options)
    return output


@pytest.fixture(scope="module")
def plain(tokenizer, pipeline):
    """The greedy output that asks for nothing, which goes on to its limit."""
    text, reason, num_tokens = ask_one(tokenizer, pipeline)
    assert (reason, num_tokens) == ("length", 24)
    return text


@pytest.mark.parametrize("options", [{}, {"temperature": 1.5, "seed": 1, "n": 2}])
def test_a_bias_of_100_forces_a_token_and_one_of_minus_100_bans_it(tokenizer, pipeline, options):
    (token_id,) = tokenizer.encode(" x")
    outputs = ask(tokenizer, pipeline, logit_bias={str(token_id): 100}, **options)
    assert outputs == [(" x" * 24, "length", 24)] * options.get("n", 1)

    async def chat(_, client):
        return await client.chat.completions.create(
            model=MODEL, messages=CHAT, max_tokens=5, logit_bias={str(token_id): 100}
        )

    assert ask_demo(tokenizer, pipeline, chat).choices[0].message.content == " x" * 5


def test_a_banned_token_does_not_come(tokenizer, pipeline, plain):
    first = tokenizer.encode(PROMPT + plain)[len(tokenizer.encode(PROMPT))]
    text, *_ = ask_one(tokenizer, pipeline, logit_bias={str(first): -100})
    assert tokenizer.encode(PROMPT + text)[len(tokenizer.encode(PROMPT))] != first


@pytest.mark.parametrize(
    "penalty",
    [
        {"presence_penalty": 2.0},
        {"frequency_penalty": 2.0},
        {"repetition_penalty": 1.5},
        {"presence_penalty": -2.0, "frequency_penalty": -2.0},
    ],
    ids=str,
)
def test_a_penalty_changes_how_much_an_output_repeats_itself(tokenizer, pipeline, plain, penalty):
    def num_distinct(text):
        return len(set(tokenizer.encode(text)))

    text, *_ = ask_one(tokenizer, pipeline, ignore_eos=True, **penalty)
    if min(penalty.values()) > 0:
        assert num_distinct(text) > num_distinct(plain)
    else:
        assert num_distinct(text) < num_distinct(plain)


def test_a_repetition_penalty_is_that_of_transformers_also_where_the_model_asks_for_it(pipeline):
    tokenizer = Tokenizer.load(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(find_directory(DEMO_MODEL), dtype=torch.float32)
    prompt = tokenizer.encode(PROMPT)
    generated = model.generate(
        torch.tensor([prompt]), max_new_tokens=24, do_sample=False, repetition_penalty=1.2
    )
    expected = tokenizer._backend.decode(generated[0, len(prompt) :].tolist())
    assert ask_one(tokenizer, pipeline, repetition_penalty=1.2)[0] == expected
    unpenalized = ask_one(tokenizer, pipeline)[0]
    tokenizer.sampling_defaults = SamplingDefaults(repetition_penalty=1.2)
    assert ask_one(tokenizer, pipeline)[0] == expected != unpenalized
    assert ask_one(tokenizer, pipeline, repetition_penalty=1.0)[0] == unpenalized


def test_no_stop_string_counts_before_the_least_tokens(tokenizer, pipeline, plain):
    stop = plain[2:5]
    text, reason, num_tokens = ask_one(tokenizer, pipeline, stop=stop)
    assert (text, reason) == (plain[: plain.index(stop)], "stop")
    later = ask_one(tokenizer, pipeline, stop=stop, min_tokens=num_tokens)
    assert later[0].startswith(plain[: plain.index(stop) + len(stop)])
    assert later[2] > num_tokens


@pytest.mark.parametrize("is_ignored", [False, True])
def test_no_token_that_ends_an_output_comes_before_the_least_tokens(
    tokenizer, pipeline, is_ignored
):
    """Biased towards them, outputs end as soon as they may."""
    own, (models,) = tokenizer.encode(" x")[0], tokenizer.stop_token_ids
    options = {"ignore_eos": is_ignored, "stop_token_ids": [own], "temperature": 1.0, "seed": 2}
    for min_tokens in (0, 7):
        for end in (own, models):
            _, reason, num_tokens = ask_one(
                tokenizer, pipeline, min_tokens=min_tokens, logit_bias={str(end): 100}, **options
            )
            if is_ignored and end == models:
                assert (reason, num_tokens) == ("length", 24)
            else:
                assert (reason, num_tokens) == ("stop", min_tokens + 1)


@pytest.mark.parametrize("is_included", [False, True])
def test_a_stop_is_shown_where_that_is_asked_for(tokenizer, pipeline, plain, is_included):
    options = {"include_stop_str_in_output": is_included}
    stop = plain[4:7]
    start = plain.index(stop)
    text, reason, _ = ask_one(tokenizer, pipeline, stop=stop, **options)
    assert (text, reason) == (plain[: start + is_included * len(stop)], "stop")
    # A token of the client's has text; the model's own has none.
    x = tokenizer.encode(" x")[0]
    forced = {"stop_token_ids": [x], "logit_bias": {str(x): 100}}
    shown = " x" if is_included else ""
    assert ask_one(tokenizer, pipeline, **forced, **options) == (shown, "stop", 1)
    (end,) = tokenizer.stop_token_ids
    assert ask_one(tokenizer, pipeline, logit_bias={str(end): 100}, **options) == ("", "stop", 1)


async def ask_for_twelve(service, client):
    options = {
        "prompt": [PROMPT, PROMPT + "    return", "import "],
        "n": 4,
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 80,
        "min_tokens": 40,
        "stop": "e",
        "presence_penalty": 0.5,
        "frequency_penalty": 0.3,
        "repetition_penalty": 1.1,
        "logit_bias": {"50": 2, "60": -3},
    }
    return await complete(client, **options), service.scheduler.load().num_preemptions


@pytest.fixture(scope="module")
def twelve(tokenizer, pipeline):
    outputs, _ = ask_demo(tokenizer, pipeline, ask_for_twelve)
    return outputs


@pytest.mark.parametrize(
    "scheduler",
    [{"num_blocks": 64}, {"num_blocks": 64, "ring": True}, {"ring": True}, {"max_decodes": 1}],
    ids=["preempted", "preempted in the ring", "ring", "in turns"],
)
def test_outputs_do_not_depend_on_how_they_are_scheduled(tokenizer, pipeline, twelve, scheduler):
    outputs, num_preemptions = ask_demo(tokenizer, pipeline, ask_for_twelve, **scheduler)
    assert outputs == twelve
    assert len({text for text, *_ in outputs}) == 12
    assert (num_preemptions > 0) == ("num_blocks" in scheduler)


def test_nothing_is_kept_of_outputs_that_ended_or_were_given_up(tokenizer, pipeline):
    counts = pipeline._workers[-1]._outputs

    async def scenario(service, client):
        for number in range(3):
            stream = await client.completions.create(
                model=MODEL, prompt="x", n=8, stream=True, max_tokens=90, presence_penalty=1
            )
            await anext(stream)
            await stream.close()
            await service.until_idle()
            await complete(client, n=4, presence_penalty=1)
            assert len(counts) <= 4, number
        # What ended last is told with the next micro-batch, whatever it is of.
        await client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        return len(counts)

    counts.clear()
    assert ask_demo(tokenizer, pipeline, scenario) == 0


def test_penalties_act_on_what_a_grammar_leaves(tokenizer, pipeline):
    async def scenario(_, client):
        answers = [
            await client.completions.create(
                model=MODEL,
                prompt=PROMPT,
                max_tokens=40,
                temperature=0,
                presence_penalty=penalty,
                extra_body={"structured_outputs": {"regex": "[ab]{12}"}},
            )
            for penalty in (0, 2, -2)
        ]
        return [answer.choices[0].text for answer in answers]

    texts = ask_demo(tokenizer, pipeline, scenario)
    assert all(len(text) == 12 and set(text) <= {"a", "b"} for text in texts)
    assert len(set(texts)) > 1


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        (
            {"min_tokens": 9, "max_tokens": 8},
            "min_tokens",
            "min_tokens=9 is more than max_tokens=8",
        ),
        (
            {"min_tokens": 9, "response_format": {"type": "json_object"}},
            "min_tokens",
            "has to end where it is complete; leave one of them out",
        ),
        ({"logit_bias": {"x": 1}}, "logit_bias", "'x', which is no token id of this model; use 0"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids", "1000000, which is no token id"),
        (
            {"logit_bias": {str(i): 1 for i in range(1500)}},
            "logit_bias",
            "at most 1024 keys, not 1500",
        ),
        ({"stop_token_ids": [1] * 200}, "stop_token_ids", "at most 128"),
        ({"presence_penalty": 3}, "presence_penalty", "at most 2"),
        ({"repetition_penalty": 0}, "repetition_penalty", "above 0"),
    ],
)
@pytest.mark.parametrize("path", BODIES)
def test_what_cannot_be_is_refused_with_what_to_change(
    tokenizer, pipeline, path, body, param, words
):
    async def scenario(service, client):
        with pytest.raises(openai.BadRequestError) as caught:
            await client.post(
                path.removeprefix("/v1"),
                body=None,
                options={"headers": {"Content-Type": "application/json"}},
                content=json.dumps(BODIES[path] | body).encode(),
                cast_to=object,
            )
        assert service.requests == []
        return caught.value

    error = ask_demo(tokenizer, pipeline, scenario)
    assert (error.status_code, error.param) == (400, param)
    assert words in error.message
