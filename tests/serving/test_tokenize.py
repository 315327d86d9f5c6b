"""The tokens that /tokenize tells of are those the model gets to see, and /detokenize undoes it."""

import asyncio

import httpx
import pytest
from tokenizers import processors

from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import QWEN, THINKING, copy_demo
from tests.fakes import LocalService, ScriptedPipeline
from tests.serving.local_api import CHAT, http_client, local_api

TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("models") / "thinker", THINKING))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("models") / "qwen", QWEN))


def post(tokenizer, path, body, **options):
    async def main():
        async with local_api(tokenizer, "x", **options) as (_, http):
            return await http.post(path, json=body)

    return asyncio.run(main())


def answer(tokenizer, path, body, **options):
    response: httpx.Response = post(tokenizer, path, body, **options)
    assert response.status_code == 200, response.text
    return response.json()


def served_prompt(tokenizer, path, body):
    """The prompt that the engine is given for a body."""

    async def main():
        async with local_api(tokenizer, "x") as (service, http):
            response = await http.post(path, json={"model": service.model_name, **body})
            assert response.status_code == 200, response.text
            return list(service.requests[0].prompt_token_ids)

    return asyncio.run(main())


@pytest.mark.parametrize("text", ["def f(x):", "naïve 😀 €", "<|end|> and <|user|>"])
def test_a_text_has_the_tokens_that_a_completion_is_given_and_back(tokenizer, text):
    told = answer(tokenizer, "/tokenize", {"prompt": text})
    assert told["tokens"] == served_prompt(tokenizer, "/v1/completions", {"prompt": text})
    assert told["count"] == len(told["tokens"])
    assert told["max_model_len"] == 128
    assert told["token_strs"] is None
    assert answer(tokenizer, "/detokenize", {"tokens": told["tokens"]}) == {"prompt": text}


def test_a_text_that_no_context_has_room_for_is_counted(tokenizer):
    told = answer(tokenizer, "/tokenize", {"prompt": "a b " * 200})
    assert told["count"] > told["max_model_len"]


def test_special_tokens_stand_around_a_text_unless_it_is_asked_without(tmp_path):
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "model", QWEN))
    begin = tokenizer._backend.token_to_id("<|user|>")
    tokenizer._backend.post_processor = processors.TemplateProcessing(
        "<|user|> $A", None, [("<|user|>", begin)]
    )
    bare = answer(tokenizer, "/tokenize", {"prompt": "a b", "add_special_tokens": False})["tokens"]
    assert begin not in bare
    for options in ({}, {"add_special_tokens": True}, {"add_special_tokens": None}):
        told = answer(tokenizer, "/tokenize", {"prompt": "a b", **options})
        assert told["tokens"] == [begin, *bare]


def test_tokens_are_told_by_their_names(tokenizer):
    body = {"prompt": "def f<|end|>", "return_token_strs": True}
    told = answer(tokenizer, "/tokenize", body)
    assert told["token_strs"] == tokenizer._tokenizer.convert_ids_to_tokens(told["tokens"])


@pytest.mark.parametrize(
    "body",
    [
        {"messages": CHAT},
        {"messages": CHAT, "chat_template_kwargs": {"enable_thinking": False}},
        {"messages": CHAT, "reasoning_effort": "low", "add_generation_prompt": False},
        {
            "messages": [*CHAT, {"role": "assistant", "content": "def"}],
            "continue_final_message": True,
        },
    ],
)
def test_a_conversation_has_the_tokens_that_a_chat_is_given(thinker, body):
    expected = served_prompt(thinker, "/v1/chat/completions", body)
    assert answer(thinker, "/tokenize", body)["tokens"] == expected


def test_tools_are_tokens_too(qwen):
    body = {"messages": CHAT, "tools": [TOOL]}
    expected = served_prompt(qwen, "/v1/chat/completions", body)
    assert answer(qwen, "/tokenize", body)["tokens"] == expected


@pytest.mark.parametrize(
    ("path", "body", "param", "words"),
    [
        ("/tokenize", {}, "prompt", "either prompt or messages"),
        ("/tokenize", {"prompt": 5}, "prompt", "must be text, not a number"),
        ("/tokenize", {"prompt": "x", "messages": CHAT}, "prompt", "either prompt or messages"),
        ("/tokenize", {"messages": []}, "messages", "1 or more"),
        ("/tokenize", {"messages": [{"role": "user"}]}, "messages[0].content", "content"),
        ("/tokenize", {"messages": CHAT, "tools": [TOOL]}, "tools", "shows no tools"),
        (
            "/tokenize",
            {"messages": CHAT, "add_special_tokens": True},
            "add_special_tokens",
            "supported",
        ),
        ("/tokenize", {"messages": CHAT, "reasoning_effort": "low"}, "reasoning_effort", "look at"),
        ("/tokenize", {"prompt": "x", "model": "other"}, "model", "does not exist"),
        ("/tokenize", {"prompt": "a" * 10**5}, "prompt", "100000 characters"),
        ("/detokenize", {}, "tokens", "is required"),
        ("/detokenize", {"tokens": "x"}, "tokens", "must be a list"),
        ("/detokenize", {"tokens": ["x"]}, "tokens[0]", "must be a whole number"),
        ("/detokenize", {"tokens": [0, -1]}, "tokens", "has -1, which is no token"),
        ("/detokenize", {"tokens": [10**30]}, "tokens", "; use 0 to 4095"),
        ("/detokenize", {"tokens": [1], "model": "other"}, "model", "does not exist"),
    ],
)
def test_a_mistake_is_refused_by_name(tokenizer, path, body, param, words):
    response = post(tokenizer, path, body)
    error = response.json()["error"]
    assert response.status_code == (404 if body.get("model") else 400)
    assert error["param"] == param
    assert words in error["message"]


def test_a_text_of_more_tokens_than_an_answer_may_have_is_refused(tokenizer):
    text = "z" * (2**20 + 1)
    num_tokens = len(tokenizer.encode(text))
    assert num_tokens > 2**20
    limits = {"max_model_len": 2**20, "max_body_bytes": 2**23}
    response = post(tokenizer, "/tokenize", {"prompt": text}, **limits)
    assert response.status_code == 400
    assert f"{num_tokens} tokens; the limit is 1048576" in response.json()["error"]["message"]


def test_the_body_may_be_anything_but_an_object(tokenizer):
    for body in ([], "x", 5, None):
        assert post(tokenizer, "/tokenize", body).status_code == 400


def test_of_several_models_the_one_that_is_meant_must_be_named(tokenizer, qwen):
    async def main():
        async with (
            LocalService(tokenizer, ScriptedPipeline([])) as one,
            LocalService(qwen, ScriptedPipeline([])) as two,
        ):
            two.model_name = "other"
            async with http_client(one, two) as http:
                body = {"messages": CHAT, "tools": [TOOL]}
                unnamed = await http.post("/tokenize", json=body)
                named = [
                    await http.post("/tokenize", json={"model": service.model_name, **body})
                    for service in (one, two)
                ]
                return unnamed, [response.status_code for response in named]

    unnamed, named = asyncio.run(main())
    assert unnamed.status_code == 400
    assert unnamed.json()["error"]["param"] == "model"
    assert "'other'" in unnamed.json()["error"]["message"]
    assert named == [400, 200]


def test_strangers_are_told_no_tokens(tokenizer):
    for path in ("/tokenize", "/detokenize"):
        assert post(tokenizer, path, {}, api_keys=("key",)).status_code == 401
