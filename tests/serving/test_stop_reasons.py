"""A choice tells which of the client's own stop strings and tokens ended it."""

import asyncio

import pytest

from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import QWEN, copy_demo
from tests.serving.local_api import BODIES, CHAT, local_api, sse_chunks

TEXT = "def add(a, b):\n    return a + b"
CHAT_PATH, COMPLETION_PATH = BODIES


def reasons(tokenizer, path, change, text=TEXT, **options):
    """Why an answer ended, whole and streamed; they have to agree."""

    async def main():
        async with local_api(tokenizer, text, **options) as (_, http):
            body = {"max_tokens": 60} | BODIES[path] | change
            whole = await http.post(path, json=body)
            streamed = await http.post(path, json=body | {"stream": True})
            return whole.json(), sse_chunks(streamed.text)

    whole, (*chunks, last, _) = asyncio.run(main())
    assert all("stop_reason" not in chunk["choices"][0] for chunk in chunks)
    told = [
        (choice["finish_reason"], choice["stop_reason"])
        for choice in (whole["choices"][0], last["choices"][0])
    ]
    assert told[0] == told[1]
    return told[0]


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("stop", "reason"),
    [("turn", "turn"), (["nowhere", "a +", "add"], "add"), (["rn", "turn", "n"], "turn")],
)
@pytest.mark.parametrize("is_included", [False, True])
def test_a_stop_string_is_told(tokenizer, path, stop, reason, is_included):
    change = {"stop": stop, "include_stop_str_in_output": is_included}
    assert reasons(tokenizer, path, change) == ("stop", reason)


@pytest.mark.parametrize("path", BODIES)
def test_a_stop_token_is_told_by_its_id(tokenizer, path):
    token_id = tokenizer.encode(TEXT)[3]
    change = {"stop_token_ids": [token_id, 0], "stop": "nowhere"}
    assert reasons(tokenizer, path, change) == ("stop", token_id)


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({}, "stop"),
        ({"stop": "nowhere", "stop_token_ids": [0]}, "stop"),
        ({"max_tokens": 2, "stop": "nowhere"}, "length"),
    ],
)
def test_what_the_client_did_not_name_is_not_told(tokenizer, path, change, reason):
    assert reasons(tokenizer, path, change) == (reason, None)


def test_an_output_with_tool_calls_tells_it_too(tmp_path):
    tokenizer = Tokenizer.load(copy_demo(tmp_path / "qwen", QWEN))
    function = {"name": "f", "parameters": {"type": "object"}}
    change = {
        "messages": CHAT,
        "tools": [{"type": "function", "function": function}],
        "stop": "nothing",
    }
    call = '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>'
    text = f"{call} and nothing else"
    told = reasons(tokenizer, CHAT_PATH, change, text, max_model_len=256)
    assert told == ("tool_calls", "nothing")
