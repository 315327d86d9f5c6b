"""What is a call and what is content, however the text is cut."""

import json
import time
from itertools import groupby, pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gllm_ray.serving.tool_parsers import (
    CallDelta,
    HermesParser,
    JsonCallsParser,
    NamedCallParser,
    merge_calls,
    parse_call,
)

TAG = "<|python_tag|>"
ARRAY, LLAMA = "[],", ";"
PARSERS = {
    "hermes": HermesParser,
    "llama": lambda: JsonCallsParser(LLAMA, TAG),
    "array": lambda: JsonCallsParser(ARRAY),
    "named": lambda: NamedCallParser("f"),
}
ARGUMENTS = [
    "{}",
    '{"a": 1.10, "b": [1e400, -0]}',
    '{ "a" :"}</tool_call",\n"a": "\\"{\\\\"}',
    '{"€": "\\ud83d\\ude00 \\ud800 😀", "n": {"n": {}}}',
]
CALLS = [
    '{"name": "f", "arguments": {}}',
    '{"type": "function", "name": "g_2", "parameters": {"x": "}<tool_call>{"}}',
    *(f'\n{{"name": "h",\n"arguments" : {arguments}}}\n' for arguments in ARGUMENTS),
]
NO_CALLS = [
    "",
    "{}",
    "[]",
    "null",
    "{",
    '"name"',
    '{"name": "f"}',
    '{"name": "f", "arguments": null}',
    '{"name": "f", "arguments": "{}"}',
    '{"name": "f", "arguments": [1]}',
    '{"name": 1, "arguments": {}}',
    '{"name": "\\ud800", "arguments": {}}',
    '{"arguments": {}}',
    '{"name": "f", "arguments": {"a": NaN}}',
    '{"name": "f", "arguments": {"a": Infinity}}',
    '{"name": "f", "arguments": {}} {}',
    '{"name": "f", "arguments": {"a": ' + "9" * 5000 + "}}",
    '{"name": "f", "arguments": {"a": ' + "[" * 10**5 + "]" * 10**5 + "}}",
    '{"name": "f", "arguments": {"a": "\n"}}',
    "{'name': 'f', 'arguments': {}}",
    '{"name": "f", "arguments": {},}',
]
FRAGMENTS = [
    *CALLS,
    *filter(lambda text: len(text) < 100, NO_CALLS),
    *(f"<tool_call>{call}</tool_call>" for call in CALLS),
    "<tool_call>",
    "</tool_call>",
    "<tool_",
    "</tool",
    TAG,
    TAG[:5],
    *" \n;[],{}<€😀",
    "Let me see. ",
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS), max_size=8).map("".join)


def parse(name, *texts):
    """The content and the calls, in their order; content that goes on is one piece."""
    parser = PARSERS[name]()
    pieces = [piece for text in texts for piece in parser.step(text)] + parser.flush()
    assert "" not in pieces
    merged = []
    for kind, group in groupby(pieces, type):
        same = list(group)
        merged += merge_calls(same) if kind is CallDelta else ["".join(same)]
    return merged


@pytest.mark.parametrize("name", PARSERS)
@given(text=TEXTS, cuts=st.lists(st.integers(0, 400), max_size=30))
@example(text="x".join(FRAGMENTS), cuts=range(400))
@example(text=TAG + ";".join(CALLS), cuts=range(400))
@example(text=f"[{','.join(CALLS)}]", cuts=range(400))
def test_a_text_says_the_same_however_it_is_cut(name, text, cuts):
    places = [0, *sorted(cuts), len(text)]
    pieces = [text[a:b] for a, b in pairwise(places)]
    assert parse(name, *pieces) == parse(name, text)


@given(text=TEXTS)
@example(text=" a <tool_call>x</tool_call> b " + "".join(FRAGMENTS))
def test_all_of_a_text_is_content_or_calls_of_hermes(text):
    for piece in (pieces := parse("hermes", text)):
        if isinstance(piece, str):
            gap, _, text = text.partition(piece)
            assert gap.strip() == ""
        else:
            gap, _, text = text.partition("<tool_call>")
            call, end, text = text.partition("</tool_call>")
            assert gap.strip() == ""
            # At the end of the text, part of the marker may be missing.
            ends = range(len(call), len(call) - (1 if end else 12), -1)
            assert piece in [parse_call(call[:end]) for end in ends]
    assert text.strip() == "" or not pieces


@given(text=TEXTS)
@example(text=TAG + ";".join(CALLS) + "; and " + TAG)
def test_all_of_a_text_is_content_or_calls_in_json(text):
    for name, around in (("llama", LLAMA), ("array", ARRAY)):
        rest, ignored = text, f" \r\n\t{around}"
        for piece in parse(name, text):
            if isinstance(piece, str):
                assert rest.endswith(piece)
                rest = rest.removesuffix(piece)
                continue
            rest = rest.lstrip(ignored)
            if name == "llama":
                rest = rest.removeprefix(TAG).lstrip(ignored)
            end = json.JSONDecoder().raw_decode(rest)[1]
            assert parse_call(rest[:end]) == piece
            rest = rest[end:]
        assert rest.strip(ignored) == ""


@pytest.mark.parametrize("arguments", ARGUMENTS)
def test_the_arguments_are_spelled_as_the_model_spelled_them(arguments):
    for key in ("arguments", "parameters"):
        text = f'{{"{key}": {{"name": "x"}}, "name": "a", "name":"b", "{key}" :\n{arguments} }}'
        assert parse_call(text) == CallDelta("b", arguments)


@pytest.mark.parametrize("text", NO_CALLS, ids=range(len(NO_CALLS)))
def test_what_is_no_call_is_content_as_it_was_written(text):
    assert parse_call(text) is None
    marked = f"a <tool_call>{text}</tool_call> b"
    assert parse("hermes", marked) == [marked]
    good = "<tool_call>\n" + CALLS[0] + "\n</tool_call>"
    call = CallDelta("f", "{}")
    assert parse("hermes", good + "\n" + marked) == [call, marked]
    assert parse("hermes", marked + good) == [marked, call]
    if text.count("{") < 2 or text[-1] != "}":  # others begin with a call
        assert parse("llama", text) == ([text] if text else [])


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("hermes", "Hi €", ["Hi €"]),
        ("hermes", "", []),
        ("hermes", " \n", [" \n"]),
        ("hermes", "a\n<tool_call>C</tool_call>\n \n<tool_call>C</tool_call>\n", ["a\n", "C", "C"]),
        ("hermes", "<tool_call>C</tool_call>\n so ", ["C", "so "]),
        ("hermes", "<tool_call>\nC", ["C"]),
        ("hermes", "<tool_call>\nC\n</tool_c", ["C"]),
        ("hermes", '<tool_call>\n{"name": "f', ['<tool_call>\n{"name": "f']),
        ("hermes", "<tool_call><tool_call>C</tool_call>", ["<tool_call><tool_call>C</tool_call>"]),
        ("hermes", "a </tool_call> < <tool", ["a </tool_call> < <tool"]),
        ("llama", "C", ["C"]),
        ("llama", f" {TAG}\nC; C;C\nC ", ["C", "C", "C", "C"]),
        ("llama", "C; and so", ["C", "; and so"]),
        ("llama", f"C;{TAG}C", ["C", f";{TAG}C"]),
        ("llama", 'C; {"name": "f', ["C", '; {"name": "f']),
        ("llama", "Here: C", ["Here: C"]),
        ("llama", '{"answer": 42} C', ['{"answer": 42} C']),
        ("llama", f"{TAG}search.call()", [f"{TAG}search.call()"]),
        ("llama", TAG, [TAG]),
        ("llama", TAG[:7], [TAG[:7]]),
        ("llama", TAG[:7] + "C", [TAG[:7] + "C"]),
        ("array", "[C, C]", ["C", "C"]),
        ("array", "[\n  C\n]", ["C"]),
        ("array", '[C, {"name": "f"', ["C", ', {"name": "f"']),
        ("array", "[", ["["]),
    ],
)
def test_what_is_said_before_between_and_after_calls(name, text, expected):
    pieces = parse(name, text.replace("C", CALLS[0]))
    call = CallDelta("f", "{}")
    assert pieces == [call if piece == "C" else piece.replace("C", CALLS[0]) for piece in expected]


def test_content_is_held_back_only_while_it_may_begin_a_marker():
    parser = HermesParser()
    assert parser.step("a <") == ["a "]
    assert parser.step("tool_") == []
    assert parser.step("x <tool_ca") == ["<tool_x "]
    assert parser.step("ll>" + CALLS[0] + "</tool_") == []
    assert parser.step("call>") == [CallDelta("f", "{}")]
    assert parser.step("b") == ["b"]
    parser = JsonCallsParser(LLAMA, TAG)
    assert parser.step(CALLS[0]) == [CallDelta("f", "{}")]
    assert parser.step(" ;") == []
    assert parser.step("x") == [" ;x"]
    assert parser.step(CALLS[0]) == [CALLS[0]]


def test_the_arguments_of_a_named_call_come_as_they_grow():
    parser = NamedCallParser("f")
    assert parser.step("") == []
    assert parser.step('{"a"') == [CallDelta("f", '{"a"')]
    assert parser.step(": 1}") == [CallDelta(None, ": 1}")]
    assert parser.flush() == []


LONG = 400_000


@pytest.mark.parametrize(
    ("name", "begin", "unit"),
    [
        ("hermes", "<tool_call>", "x"),
        ("hermes", "<tool_call>" + CALLS[0] + "</tool_call>", "\n"),
        ("hermes", "<tool_call>", "</tool_call"),
        ("llama", "{", "x"),
        ("llama", "", "\n"),
        ("array", "", '{"name": "f", "parameters": {}},'),
        ("hermes", "", "<tool_call></tool_call>"),
        ("hermes", '<tool_call>{"name": "f", "arguments": {}', ', "a": 1'),
    ],
)
def test_a_long_text_takes_time_in_proportion(name, begin, unit):
    parser = PARSERS[name]()
    begun = time.process_time()
    for char in begin + unit * (LONG // len(unit)):
        parser.step(char)
    parser.flush()
    assert time.process_time() - begun < 4
