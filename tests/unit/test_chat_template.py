import json

import pytest

from gllm_ray.config import ModelConfig
from gllm_ray.errors import InvalidRequestError
from gllm_ray.model.chat_template import guess_tool_parser, variables_of
from gllm_ray.model.tokenizer import Tokenizer
from tests.chat_templates import DEMO, LLAMA, MARKED, QWEN, THINKING, XML, copy_demo

TOOL = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds “numbers”.",
        "parameters": {"type": "object", "properties": {"a": {"default": None}}},
    },
}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": {"a": "€"}}}
CHAT = [
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "2", "tool_call_id": "1"},
]


@pytest.mark.parametrize(
    ("template", "reads_tools", "parser"),
    [
        (QWEN, True, "hermes"),
        (LLAMA, True, "llama3_json"),
        (XML, True, "none"),
        (MARKED, False, "none"),
        ("{{ messages[0].content }} tools", False, "none"),
        ("{% set tools = 'x' %}{{ tools }}", False, "none"),
        ("{% for tools in messages %}{{ tools.content }}{% endfor %}", False, "none"),
        ("{{ messages[0].tools }}{{ 'tools' }}", False, "none"),
    ],
)
def test_a_template_tells_whether_it_shows_tools_and_how_calls_are_spelled(
    template, reads_tools, parser
):
    assert ("tools" in variables_of(template)) == reads_tools
    assert guess_tool_parser(template) == parser


def load(tmp_path, template, **options):
    return Tokenizer.for_model(ModelConfig(path=copy_demo(tmp_path / "model", template), **options))


def rendered(tokenizer, messages, tools=None):
    ids = tokenizer.apply_chat_template(messages, tools)
    return tokenizer._backend.decode(ids, skip_special_tokens=False)


def test_the_configuration_overrules_the_template(tmp_path):
    tokenizer = load(tmp_path, QWEN)
    assert (tokenizer.tool_parser, tokenizer.reads_tools) == ("hermes", True)
    for name in ("none", "llama3_json"):
        config = ModelConfig(path=str(tmp_path / "model"), tool_parser=name)
        assert Tokenizer.for_model(config).tool_parser == name
    demo = Tokenizer.load(DEMO)
    assert (demo.tool_parser, demo.reads_tools, demo.reads_tool_calls) == ("none", False, False)


def test_a_template_of_qwen_shows_tools_calls_and_their_results(tmp_path):
    tokenizer = load(tmp_path, QWEN)
    text = rendered(tokenizer, CHAT, [TOOL])
    assert f"<tools>\n{json.dumps(TOOL, ensure_ascii=False)}\n</tools>" in text
    assert text.endswith(
        '<|assistant|>\n<tool_call>\n{"name": "add", "arguments": {"a": "€"}}\n</tool_call><|end|>'
        "<|user|>\n<tool_response>\n2\n</tool_response><|end|><|assistant|>"
    )
    assert rendered(tokenizer, CHAT[:1]) == "<|user|>1 + 1?<|end|><|assistant|>"
    assert tokenizer.reads_tool_calls


def test_a_template_of_llama_shows_tools_calls_and_their_results(tmp_path):
    tokenizer = load(tmp_path, LLAMA)
    text = rendered(tokenizer, CHAT, [TOOL])
    assert json.dumps(TOOL, ensure_ascii=False, indent=4) in text
    assert text.endswith(
        '<|assistant|>\n\n{"name": "add", "parameters": {"a": "€"}}<|end|>'
        '<|user|>ipython\n\n"2"<|end|><|assistant|>\n\n'
    )
    twice = [CHAT[0], CHAT[1] | {"tool_calls": [CALL, CALL]}]
    with pytest.raises(InvalidRequestError, match="only supports single tool-calls"):
        tokenizer.apply_chat_template(twice, [TOOL])


def test_the_template_for_tools_counts_where_a_model_has_several(tmp_path):
    tokenizer = load(tmp_path, MARKED)
    tokenizer._tokenizer.chat_template = {"default": MARKED, "tool_use": QWEN}
    assert (tokenizer.tool_parser, tokenizer.reads_tools) == ("hermes", True)


def test_tools_that_cannot_be_shown_are_refused(tmp_path):
    tokenizer = load(tmp_path, QWEN)
    schema = {}
    for _ in range(5000):
        schema = {"items": schema}
    half = {"title": "\ud800"}
    for parameters, words in ((schema, "recursion"), (half, "surrogates not allowed")):
        tool = {"type": "function", "function": {"name": "f", "parameters": parameters}}
        with pytest.raises(InvalidRequestError, match=f"chat template refuses .*{words}"):
            tokenizer.apply_chat_template(CHAT[:1], [tool])


@pytest.mark.parametrize(
    ("template", "variables"),
    [
        (THINKING, {"enable_thinking", "reasoning_effort"}),
        (LLAMA, {"custom_tools", "tool_call"}),  # The latter is set, but not on every way.
        (QWEN, set()),
        (
            "{{ namespace(x=range(3)).x }}{{ bos_token }}{{ strftime_now('%Y') }}{{ year }}",
            {"year"},
        ),
        ({"default": "{{ a }}", "tool_use": "{{ b }}"}, {"b"}),
        ({"other": "{{ a }}"}, set()),
        (None, set()),
    ],
)
def test_a_template_tells_what_it_may_be_told(tmp_path, template, variables):
    tokenizer = load(tmp_path, QWEN)
    tokenizer._tokenizer.bos_token = "<|bos|>"
    tokenizer._tokenizer.chat_template = template
    assert tokenizer.template_variables == variables
