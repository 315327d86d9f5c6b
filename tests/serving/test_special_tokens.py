"""Special tokens in the text of an output, where a request asks for them."""

import asyncio

import pytest

from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import QWEN, copy_demo
from tests.fakes import LocalService
from tests.serving.demo_api import ask_demo, start_demo_pipeline
from tests.serving.local_api import BODIES, CHAT, openai_client

MODEL = LocalService.model_name
CHAT_PATH, COMPLETION_PATH = BODIES
SHOWN = {"skip_special_tokens": False}
TEXT = "a<|user|>b<|assistant|><|pad|>c"
HIDDEN_TEXT = "abc"
CALL = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'


def say(tokenizer, path, text=TEXT, extra=SHOWN, **options):
    """Text, calls, finish reason and log probabilities, whole; a stream has the same text."""

    async def main():
        async with openai_client(tokenizer, text, max_model_len=512) as (_, client):
            is_chat = path == CHAT_PATH
            route = client.chat.completions if is_chat else client.completions
            asked = {"model": MODEL, "extra_body": extra, **options}
            asked |= {"messages": CHAT} if is_chat else {"prompt": "x"}
            (choice,) = (await route.create(**{"max_tokens": 99} | asked)).choices
            said = choice.message.content if is_chat else choice.text
            streamed, reason = "", None
            async for chunk in await route.create(**{"max_tokens": 99} | asked, stream=True):
                (part,) = chunk.choices
                streamed += (part.delta.content if is_chat else part.text) or ""
                reason = part.finish_reason
            assert (streamed, reason) == (said or "", choice.finish_reason)
            return said, choice

    return asyncio.run(main())


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("extra", "text"),
    [(SHOWN, TEXT), ({"skip_special_tokens": True}, HIDDEN_TEXT), ({}, HIDDEN_TEXT)],
    ids=str,
)
def test_they_show_where_they_are_not_to_be_skipped(tokenizer, path, extra, text):
    said, choice = say(tokenizer, path, extra=extra)
    assert (said, choice.finish_reason) == (text, "stop")


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("extra", "end"),
    [
        ({}, ""),
        ({"include_stop_str_in_output": True}, "<|end|>"),
        ({"ignore_eos": True}, "<|end|>a<|user|>"),
    ],
    ids=str,
)
def test_the_token_that_ends_an_output_shows_only_with_what_ended_it(tokenizer, path, extra, end):
    limit = {"max_tokens": 9} if "ignore_eos" in extra else {}
    assert say(tokenizer, path, extra=SHOWN | extra, **limit)[0] == TEXT + end


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("stop", "text"),
    [("<|assistant|>", "a<|user|>b"), ("r|>b<|", "a<|use"), ("|><|p", "a<|user|>b<|assistant")],
)
def test_a_stop_string_may_be_in_their_names(tokenizer, path, stop, text):
    said, choice = say(tokenizer, path, stop=stop)
    assert (said, choice.finish_reason, choice.stop_reason) == (text, "stop", stop)
    assert say(tokenizer, path, extra={}, stop=stop)[0] == HIDDEN_TEXT


def test_log_probabilities_tell_where_tokens_stand_in_such_a_text(tokenizer):
    pipeline = start_demo_pipeline()
    user, a = 3, *tokenizer.encode("a")

    async def scenario(_, client):
        extra = SHOWN | {"allowed_token_ids": [a, user], "bad_words": ["aa"]}
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 12, "logprobs": 0, "seed": 1}
        return (await client.completions.create(**asked, extra_body=extra)).choices[0]

    choice = ask_demo(tokenizer, pipeline, scenario)
    told = choice.logprobs
    assert set(told.tokens) == {"a", "<|user|>"}
    assert "".join(told.tokens) == choice.text
    assert told.text_offset == [len("".join(told.tokens[:index])) for index in range(12)]


@pytest.mark.parametrize("special", [(), ("<tool_call>", "</tool_call>")], ids=str)
def test_calls_are_found_beside_them(tmp_path, special):
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "qwen", QWEN, special))
    tools = [{"type": "function", "function": {"name": "f", "parameters": {"type": "object"}}}]
    said, choice = say(tokenizer, CHAT_PATH, f"<|user|>a{CALL}<|pad|>", tools=tools)
    assert (said, choice.finish_reason) == ("<|user|>a<|pad|>", "tool_calls")
    assert [call.function.name for call in choice.message.tool_calls] == ["f"]


def test_an_output_that_follows_a_grammar_has_the_special_tokens_of_the_grammar(tokenizer):
    async def scenario(_, client):
        extra = {"structured_outputs": {"grammar": 'start: "a" <|user|> "b"'}}
        asked = {"model": MODEL, "prompt": "x", "max_tokens": 12}
        return [
            (await client.completions.create(**asked, extra_body=extra | more)).choices[0].text
            for more in ({}, SHOWN)
        ]

    assert ask_demo(tokenizer, start_demo_pipeline(), scenario) == ["ab", "a<|user|>b"]
