"""What a request may tell the model's chat template beside its messages."""

import asyncio

import openai
import pytest
from jinja2 import TemplateError

from gllm_ray.model.chat_template import find_named_roles
from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import LLAMA, NAMED, QWEN, THINKING, copy_demo
from tests.serving.local_api import CHAT, openai_client

BEGUN = [*CHAT, {"role": "assistant", "content": "def f("}]


@pytest.fixture(scope="module")
def thinker(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("models") / "thinker", THINKING))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("models") / "qwen", QWEN))


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("models") / "llama", LLAMA))


def ask(tokenizer, messages=CHAT, **options):
    """The prompt that reaches the engine, as text, or the refusal."""

    async def main():
        async with openai_client(tokenizer, "x") as (service, client):
            body = {"model": service.model_name, "messages": messages, **options}
            try:
                await client.chat.completions.create(**body)
            except openai.BadRequestError as error:
                assert not service.requests
                return error
            return tokenizer._backend.decode(
                service.requests[0].prompt_token_ids, skip_special_tokens=False
            )

    return asyncio.run(main())


def ask_more(tokenizer, messages=CHAT, **options):
    """With what the client of OpenAI does not know by itself."""
    return ask(tokenizer, messages, extra_body=options)


USER = "<|user|>Write a function.<|end|>"
NO_THOUGHT = f"{USER}<|assistant|><think></think>"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, f"{USER}<|assistant|>"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, f"{USER}<|assistant|>"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, NO_THOUGHT),
        ({"chat_template_kwargs": {"enable_thinking": None}}, NO_THOUGHT),
        (
            {"chat_template_kwargs": {"reasoning_effort": 3}},
            f"<|system|>Reasoning: 3<|end|>{USER}<|assistant|>",
        ),
        ({"add_generation_prompt": True}, f"{USER}<|assistant|>"),
        ({"add_generation_prompt": False}, USER),
    ],
)
def test_the_chat_template_is_told_what_the_request_says(thinker, options, expected):
    assert ask_more(thinker, **options) == expected


def test_the_chat_template_is_told_how_much_to_reason(thinker):
    expected = f"<|system|>Reasoning: high<|end|>{USER}<|assistant|>"
    assert ask(thinker, reasoning_effort="high") == expected


@pytest.mark.parametrize("other", [{}, {"add_generation_prompt": False}])
def test_the_last_message_is_continued_where_it_stops(thinker, other):
    text = ask_more(thinker, BEGUN, continue_final_message=True, **other)
    assert text == f"{USER}<|assistant|>def f("
    empty = [*CHAT, {"role": "assistant", "content": ""}]
    assert ask_more(thinker, empty, continue_final_message=True) == f"{USER}<|assistant|>"
    whole = ask_more(thinker, BEGUN)
    assert whole == f"{USER}<|assistant|>def f(<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("messages", "options", "param", "words"),
    [
        (
            CHAT,
            {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
            "chat_template_kwargs",
            "does not look at 'thinking'; it looks at enable_thinking, reasoning_effort",
        ),
        (CHAT, {"chat_template_kwargs": {"tools": None}}, "chat_template_kwargs", "at 'tools'"),
        (CHAT, {"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs", "'tokenize'"),
        (
            CHAT,
            {"chat_template_kwargs": {"enable_thinking": [1]}},
            "chat_template_kwargs.enable_thinking",
            "",
        ),
        (
            CHAT,
            {"chat_template_kwargs": {f"x{i}": 1 for i in range(17)}},
            "chat_template_kwargs",
            "16",
        ),
        (
            CHAT,
            {"chat_template_kwargs": {"enable_thinking": "x" * 1025}},
            "chat_template_kwargs.enable_thinking",
            "1024",
        ),
        (
            CHAT,
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "low"}},
            "chat_template_kwargs",
            "reasoning_effort",
        ),
        (CHAT, {"continue_final_message": True}, "continue_final_message", "of the assistant"),
        (
            BEGUN,
            {"continue_final_message": True, "add_generation_prompt": True},
            "continue_final_message",
            "add_generation_prompt",
        ),
    ],
)
def test_what_the_chat_template_cannot_be_told_is_refused_by_name(
    thinker, messages, options, param, words
):
    error = ask_more(thinker, messages, **options)
    assert error.param.startswith(param)
    assert words in error.message


def test_a_template_that_looks_at_nothing_says_so(tokenizer):
    error = ask(tokenizer, reasoning_effort="high")
    assert error.param == "reasoning_effort"
    assert "does not look at 'reasoning_effort'; it looks at nothing of the kind" in error.message


def test_calls_cannot_be_continued(llama):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    messages = [*CHAT, {"role": "assistant", "tool_calls": [call]}]
    error = ask_more(llama, messages, continue_final_message=True)
    assert error.param == "continue_final_message"


@pytest.fixture(scope="module")
def namer(tmp_path_factory):
    return Tokenizer.load(copy_demo(tmp_path_factory.mktemp("models") / "namer", NAMED))


def named(role, name="Ada"):
    return {"role": role, "content": "Hi.", "name": name}


def test_the_model_sees_the_names_that_its_chat_template_shows(namer):
    prompt = ask(
        namer, [named("user"), {"role": "assistant", "content": "No."}, named("user", "B")]
    )
    assert prompt == (
        "<|user|>Ada: Hi.<|end|><|assistant|>No.<|end|><|user|>B: Hi.<|end|><|assistant|>"
    )
    assert ask(namer, [named("user", "")]) == "<|user|>Hi.<|end|><|assistant|>"


@pytest.mark.parametrize(
    ("is_namer", "role", "told"),
    [
        (True, "assistant", "assistant"),
        (True, "system", "system"),
        (True, "developer", "system"),
        (False, "user", "user"),
    ],
)
def test_a_name_that_the_model_would_not_see_is_refused(tokenizer, namer, is_namer, role, told):
    refusal = ask(namer if is_namer else tokenizer, [*CHAT, named(role)])
    assert refusal.param == "messages[1].name"
    assert f"shows no name of a {told} message" in refusal.message


def test_the_name_of_a_tool_goes_with_its_call(qwen):
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    said = {"role": "assistant", "tool_calls": [call]}
    answer = {"role": "tool", "tool_call_id": "1", "content": "4", "name": "f"}
    assert "4" in ask(qwen, [*CHAT, said, answer])


def test_a_template_that_refuses_a_role_shows_no_names_of_it():
    def render(messages):
        if messages[0]["role"] == "system":
            raise TemplateError("no system here")
        return str(messages)

    assert find_named_roles(render) == {"user", "assistant"}
