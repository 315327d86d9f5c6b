"""What may be drawn and what must not be said, by OpenAI's own client over the demo model."""

import json
import re

import openai
import pytest

from tests.serving.demo_api import ask_demo, start_demo_pipeline
from tests.serving.local_api import BODIES, CHAT
from tests.serving.test_logit_rules import MODEL, PROMPT, ask, ask_one, complete

PLAIN = "    return a + b\n\n\ndef _check_check_none(a, b):\n"
SEVERAL = ({}, {"temperature": 1.5, "seed": 1, "n": 3})


@pytest.fixture(scope="module")
def pipeline():
    return start_demo_pipeline(num_stages=2)


@pytest.fixture(scope="module")
def plain(tokenizer, pipeline):
    """The greedy output that asks for nothing."""
    text, *_ = ask_one(tokenizer, pipeline)
    assert text.startswith(PLAIN)
    return text


@pytest.mark.parametrize("options", SEVERAL, ids=str)
def test_only_allowed_tokens_come_and_no_bias_brings_others(tokenizer, pipeline, options):
    x, y, z = (tokenizer.encode(text)[0] for text in (" x", " y", " z"))
    options = {"logit_bias": {str(z): 100}, "allowed_token_ids": [x, y], **options}
    for text, *rest in ask(tokenizer, pipeline, **options):
        assert re.fullmatch("( x| y){24}", text)
        assert rest == ["length", 24]

    async def chat(_, client):
        asked = {"messages": CHAT, "max_tokens": 5, "extra_body": {"allowed_token_ids": [x]}}
        return await client.chat.completions.create(model=MODEL, **asked)

    assert ask_demo(tokenizer, pipeline, chat).choices[0].message.content == " x" * 5


def test_an_output_ends_by_itself_only_where_an_end_token_is_allowed(tokenizer, pipeline):
    (x,), (end,) = tokenizer.encode(" x"), tokenizer.stop_token_ids
    options = {"logit_bias": {str(end): 100}}
    kept = ask_one(tokenizer, pipeline, allowed_token_ids=[x], **options)
    assert kept == (" x" * 24, "length", 24)
    assert ask_one(tokenizer, pipeline, allowed_token_ids=[x, end], **options) == ("", "stop", 1)
    later = ask_one(tokenizer, pipeline, allowed_token_ids=[x, end], min_tokens=7, **options)
    assert later == (" x" * 7, "stop", 8)


@pytest.mark.parametrize("word", ["return", " a", "b", "\n\n\ndef _check", "return a", " + b"])
def test_a_bad_word_does_not_come_whether_or_not_a_space_is_before_it(
    tokenizer, pipeline, plain, word
):
    text, *_ = ask_one(tokenizer, pipeline, bad_words=[word])
    bare = word.lstrip()
    assert bare in plain
    assert text != plain
    for spelled in (tokenizer.encode(bare), tokenizer.encode(f" {bare}")):
        drawn = tokenizer.encode(text)
        assert all(drawn[i : i + len(spelled)] != spelled for i in range(len(drawn)))


def test_only_the_last_token_of_a_bad_word_is_ruled_out(tokenizer, pipeline, plain):
    """And only after the others, so all before it is as it was."""
    assert len(tokenizer.encode("return a + b")) == len(tokenizer.encode(" return a + b")) == 4
    text, *_ = ask_one(tokenizer, pipeline, bad_words=["return a + b"])
    assert text.startswith("    return a +")
    assert not text.startswith("    return a + b")


def test_the_prompt_is_not_the_beginning_of_a_bad_word(tokenizer, pipeline, plain):
    assert ask_one(tokenizer, pipeline, bad_words=["def add(a, b):\n    "])[0] == plain


async def ask_for_twelve(service, client):
    options = {
        "prompt": [PROMPT, PROMPT + "    return", "import "],
        "n": 4,
        "temperature": 1.0,
        "seed": 3,
        "max_tokens": 80,
        "ignore_eos": True,
        "bad_words": ["self", "e", "if not", "self.assert", "return a"],
        "allowed_token_ids": list(range(5, 1029)),
        "presence_penalty": 0.5,
    }
    return await complete(client, **options), service.scheduler.load().num_preemptions


@pytest.fixture(scope="module")
def twelve(tokenizer, pipeline):
    outputs, _ = ask_demo(tokenizer, pipeline, ask_for_twelve)
    return outputs


@pytest.mark.parametrize(
    "scheduler",
    [
        pytest.param({"num_blocks": 64, "ring": True}, id="preempted in the ring"),
        pytest.param({"num_blocks": 64}, id="preempted", marks=pytest.mark.slow),
        pytest.param({"ring": True}, id="ring", marks=pytest.mark.slow),
        pytest.param({"max_decodes": 1}, id="in turns", marks=pytest.mark.slow),
    ],
)
def test_outputs_do_not_depend_on_how_they_are_scheduled(tokenizer, pipeline, twelve, scheduler):
    outputs, num_preemptions = ask_demo(tokenizer, pipeline, ask_for_twelve, **scheduler)
    assert outputs == twelve
    assert len({text for text, *_ in outputs}) == 12
    assert (num_preemptions > 0) == ("num_blocks" in scheduler)


def test_nothing_is_kept_of_outputs_that_ended(tokenizer, pipeline):
    outputs = pipeline._workers[-1]._outputs

    async def scenario(_, client):
        await complete(client, n=4, bad_words=["return"])
        assert len(outputs) <= 4
        # What ended last is told with the next micro-batch, whatever it is of.
        await client.completions.create(model=MODEL, prompt="x", max_tokens=1)
        return len(outputs)

    outputs.clear()
    assert ask_demo(tokenizer, pipeline, scenario) == 0


def test_log_probabilities_are_those_of_all_tokens(tokenizer, pipeline):
    async def scenario(_, client):
        asked = {"model": MODEL, "prompt": PROMPT + "    ", "max_tokens": 1, "temperature": 0}
        asked |= {"logprobs": 3}
        ruled = [{"allowed_token_ids": tokenizer.encode(" x")}, {"bad_words": ["return"]}]
        return [
            (await client.completions.create(**asked, extra_body=body)).choices[0].logprobs
            for body in ({}, *ruled)
        ]

    plain, *others = ask_demo(tokenizer, pipeline, scenario)
    for told in others:
        (drawn,), (top,) = told.tokens, told.top_logprobs
        assert drawn not in plain.tokens
        likely = {token: pytest.approx(logprob) for token, logprob in plain.top_logprobs[0].items()}
        assert {token: top[token] for token in likely} == likely
        assert told.token_logprobs == [top[drawn]] < plain.token_logprobs


def test_both_act_on_what_a_grammar_leaves(tokenizer, pipeline):
    j, q, end = *(tokenizer.encode(text)[0] for text in "jq"), *tokenizer.stop_token_ids
    options = {"structured_outputs": {"regex": "[jqz]{6}"}, "temperature": 1.0, "seed": 1, "n": 4}
    texts = {text for text, *_ in ask(tokenizer, pipeline, **options)}
    assert any("z" in text for text in texts)
    options |= {"allowed_token_ids": [j, q, end], "bad_words": ["jq", "qq"]}
    for text, reason, num_tokens in ask(tokenizer, pipeline, **options):
        assert re.fullmatch("q?j{5,6}", text)
        assert (len(text), reason, num_tokens) == (6, "stop", 7)


@pytest.mark.parametrize("options", [{}, {"n": 3}, {"stream": True}])
@pytest.mark.parametrize("ring", [False, True])
def test_an_output_that_has_no_token_left_ends_with_a_reason_and_no_other_does(
    tokenizer, pipeline, plain, options, ring
):
    async def scenario(service, client):
        async def fail():
            body = {"structured_outputs": {"regex": "a{9}"}, "bad_words": ["aa", "a" * 3, "a" * 4]}
            asked = {"model": MODEL, "prompt": PROMPT, "max_tokens": 20, "extra_body": body}
            answer = await client.completions.create(**asked, **options)
            async for _ in answer:
                pass

        with pytest.raises(openai.APIError) as caught:
            await fail()
        (output,) = await complete(client)
        await service.until_idle()
        return caught.value, output

    error, output = ask_demo(tokenizer, pipeline, scenario, ring=ring)
    assert "no token is left that may come next: allowed_token_ids, bad_words" in error.message
    assert error.code == "request_breaks_engine"
    assert output[0] == plain


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"allowed_token_ids": []}, "allowed_token_ids", "1 or more items"),
        ({"allowed_token_ids": [10**6]}, "allowed_token_ids", "1000000, which is no token id"),
        ({"allowed_token_ids": [5] * 1025}, "allowed_token_ids", "at most 1024"),
        (
            {"allowed_token_ids": [303, 1050], "bad_words": ["def"]},
            "bad_words",
            "rules out every one of allowed_token_ids",
        ),
        (
            {"allowed_token_ids": [1, 5, 1050], "bad_words": [" def"], "stop_token_ids": [5]}
            | {"min_tokens": 1},
            "min_tokens",
            "every token that allowed_token_ids leaves would end the output",
        ),
        (
            {"allowed_token_ids": [303], "response_format": {"type": "json_object"}},
            "allowed_token_ids",
            "has none of [1], but an output that follows response_format has to end",
        ),
        ({"bad_words": ["ok", " "]}, "bad_words", "' ', which has no token but white space"),
        ({"bad_words": ["x"] * 129}, "bad_words", "at most 128"),
        ({"bad_words": ["x" * 1025]}, "bad_words[0]", "at most 1024"),
        (
            {"bad_words": [f"{number} q q q" for number in range(128)]},
            "bad_words",
            "tokens, with and without a space before each; the limit is 1024",
        ),
    ],
    ids=str,
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
