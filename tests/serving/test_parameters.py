"""A parameter is honoured or refused by name, never ignored."""

import asyncio
import json
import typing

import pytest
from openai.types.chat.completion_create_params import (
    CompletionCreateParamsNonStreaming as ChatParams,
)
from openai.types.completion_create_params import (
    CompletionCreateParamsNonStreaming as CompletionParams,
)
from pydantic import ValidationError

from gllm_ray.messages import LogitRules, MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.model.generation_config import SamplingDefaults
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.openai_protocol import ChatCompletionRequest, CompletionRequest
from gllm_ray.stages.metadata import MetadataDecoder, MetadataEncoder
from tests.fakes import LocalService
from tests.serving.local_api import BODIES, CHAT, local_api

CHAT_PATH, COMPLETION_PATH = BODIES
JSON = {"Content-Type": "application/json"}
COMMON = {"model", "max_tokens", "temperature", "top_p", "n", "seed", "stop", "user"}
COMMON |= {"stream", "stream_options", "presence_penalty", "frequency_penalty", "logit_bias"}
HONOURED = {
    CHAT_PATH: COMMON
    | {"messages", "max_completion_tokens", "logprobs", "top_logprobs", "response_format"}
    | {"tools", "tool_choice", "parallel_tool_calls", "reasoning_effort"},
    COMPLETION_PATH: COMMON | {"prompt", "logprobs", "echo"},
}
OFFICIAL = {
    CHAT_PATH: set(typing.get_type_hints(ChatParams)),
    COMPLETION_PATH: set(typing.get_type_hints(CompletionParams)),
}
OURS = {"top_k", "min_p", "ignore_eos", "cache_salt"}
OURS |= {"priority", "expected_output_tokens", "queue_timeout_s", "structured_outputs"}
OURS |= {"repetition_penalty", "stop_token_ids", "include_stop_str_in_output", "min_tokens"}
OURS |= {"prompt_logprobs"}
OURS |= {"allowed_token_ids", "bad_words", "skip_special_tokens", "return_token_ids"}
OWN = {
    CHAT_PATH: OURS | {"add_generation_prompt", "continue_final_message", "chat_template_kwargs"},
    COMPLETION_PATH: OURS | {"response_format"},
}
KNOWN = {path: OFFICIAL[path] | OWN[path] for path in BODIES}
TEXT = {"type": "text", "text": ""}

# What a client that asks for the feature would send, and what one sends that does not.
REQUESTS_FOR_MORE = {
    "audio": {"format": "wav", "voice": "alloy"},
    "best_of": 2,
    "function_call": {"name": "f"},
    "functions": [{"name": "f"}],
    "metadata": {"key": "value"},
    "modalities": ["text", "audio"],
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "prompt_cache_key": "key",
    "prompt_cache_options": {"ttl": "1h"},
    "prompt_cache_retention": "24h",
    "safety_identifier": "me",
    "service_tier": "priority",
    "store": True,
    "suffix": "end",
    "verbosity": "low",
    "web_search_options": {"search_context_size": "low"},
}
NEUTRAL = {
    "add_generation_prompt": True,
    "best_of": 1,
    "chat_template_kwargs": {},
    "continue_final_message": False,
    "echo": False,
    "frequency_penalty": 0.0,
    "function_call": "none",
    "functions": [],
    "logit_bias": {},
    "metadata": {},
    "modalities": ["text"],
    "n": 1,
    "parallel_tool_calls": True,
    "presence_penalty": 0,
    "repetition_penalty": 1,
    "min_tokens": 0,
    "stop_token_ids": [],
    "include_stop_str_in_output": False,
    "bad_words": [],
    "skip_special_tokens": True,
    "return_token_ids": False,
    "response_format": {"type": "text"},
    "service_tier": "auto",
    "store": False,
    "suffix": "",
    "tool_choice": "auto",
    "tools": [],
    "top_logprobs": 0,
    "user": "",
    "verbosity": "medium",
}
# Of vLLM's parameters the values that ask for nothing, and such as ask for something.
VLLMS_OF_BOTH = {
    "guided_choice": (None, ["a"]),
    "guided_grammar": (None, "x"),
    "guided_json": (None, {}),
    "guided_regex": (None, "x"),
    "kv_transfer_params": (None, {"do_remote_decode": True}),
    "length_penalty": (1, 2),
    "logits_processors": ([], ["a.B"]),
    "logprob_token_ids": (None, [1]),
    "metadata": ({}, {"key": "value"}),
    "repetition_detection": (None, {"max_pattern_size": 2}),
    "request_id": (None, "mine"),
    "return_tokens_as_token_ids": (False, True),
    "service_tier": ("auto", "priority"),
    "spaces_between_special_tokens": (True, False),
    "store": (False, True),
    "thinking_token_budget": (-1, 0),
    "truncate_prompt_tokens": (None, 5),
    "truncation_side": (None, "left"),
    "use_beam_search": (False, True),
    "vllm_xargs": ({}, {"a": 1}),
}
VLLMS = {
    COMPLETION_PATH: VLLMS_OF_BOTH
    | {"add_special_tokens": (True, False), "prompt_embeds": (None, "AA==")},
    CHAT_PATH: VLLMS_OF_BOTH
    | {
        "add_special_tokens": (False, True),
        "chat_template": (None, "{{ messages }}"),
        "documents": ([], [{"text": "x"}]),
        "echo": (False, True),
        "include_reasoning": (True, False),
        "media_io_kwargs": ({}, {"image": {}}),
        "mm_processor_kwargs": ({}, {"num_crops": 4}),
    },
}
UNSUPPORTED = [(path, name) for path in BODIES for name in sorted(OFFICIAL[path] - HONOURED[path])]


def post(tokenizer, path, change, text="x", **options):
    """The status, the body and the requests that reached the engine."""

    async def main():
        async with local_api(tokenizer, text, **options) as (service, http):
            # In ASCII, so that half of a surrogate pair can be spelled.
            content = json.dumps(BODIES[path] | change)
            response = await http.post(path, content=content, headers=JSON)
            return response.status_code, response.json(), service.requests

    return asyncio.run(main())


def request_for(tokenizer, path, change, **options):
    status, body, requests = post(tokenizer, path, change, **options)
    assert status == 200, body
    return requests[0]


@pytest.mark.parametrize("path", BODIES)
def test_the_schema_knows_exactly_openais_parameters_and_our_own(path):
    schema = ChatCompletionRequest if path == CHAT_PATH else CompletionRequest
    assert set(schema.model_fields) == KNOWN[path] | VLLMS[path].keys()


@pytest.mark.parametrize("path", BODIES)
def test_vllms_parameters_are_accepted_where_they_ask_for_nothing(tokenizer, path):
    request_for(tokenizer, path, {name: neutral for name, (neutral, _) in VLLMS[path].items()})
    status, body, _ = post(tokenizer, path, {name: more for name, (_, more) in VLLMS[path].items()})
    assert (status, body["error"]["code"]) == (400, "unsupported_parameter")
    schema = ChatCompletionRequest if path == CHAT_PATH else CompletionRequest
    for name, (_, more) in VLLMS[path].items():
        with pytest.raises(ValidationError, match="is not supported"):
            schema.model_validate(BODIES[path] | {name: more})


def test_an_answer_is_taken_back_with_its_empty_fields(tokenizer):
    empty = {"reasoning_content": None, "reasoning": None, "tool_calls": [], "annotations": []}
    answer = {"role": "assistant", "content": "x"} | empty
    request_for(tokenizer, CHAT_PATH, {"messages": [*CHAT, answer, *CHAT]})


@pytest.mark.parametrize(("path", "name"), UNSUPPORTED)
def test_what_is_not_supported_is_refused_by_name(tokenizer, path, name):
    status, body, requests = post(tokenizer, path, {name: REQUESTS_FOR_MORE[name]})
    error = body["error"]
    assert (status, error["param"], error["code"]) == (400, name, "unsupported_parameter")
    assert error["type"] == "invalid_request_error"
    assert f"{name}" in error["message"]
    assert "not supported" in error["message"]
    assert requests == []


@pytest.mark.parametrize("path", BODIES)
def test_null_and_the_values_that_ask_for_nothing_are_accepted(tokenizer, path):
    names = KNOWN[path] - {"model", "messages", "prompt"}
    for values in (dict.fromkeys(names), {name: NEUTRAL[name] for name in NEUTRAL.keys() & names}):
        request = request_for(tokenizer, path, values)
        assert request.sampling.logit_rules is None
        assert request.stop_token_ids == tokenizer.stop_token_ids


@pytest.mark.parametrize(
    ("path", "name"),
    [(path, name) for path in BODIES for name in sorted(KNOWN[path])],
)
def test_nonsense_is_refused_by_name(tokenizer, path, name):
    status, body, _ = post(tokenizer, path, {name: {"nonsense": True}})
    assert status == 400
    assert body["error"]["param"].split(".")[0] == name


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", ["topp", "guided_jsn", "chat_templates", "€"])
def test_an_unknown_parameter_is_refused_by_name(tokenizer, path, name):
    status, body, _ = post(tokenizer, path, {name: 1})
    assert (status, body["error"]["param"]) == (400, name)
    assert body["error"]["code"] == "unknown_parameter"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": 100.1}, "temperature"),
        ({"temperature": "1"}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.01}, "top_p"),
        ({"top_k": -2}, "top_k"),
        ({"top_k": 1.5}, "top_k"),
        ({"min_p": 1.1}, "min_p"),
        ({"seed": 2**63}, "seed"),
        ({"presence_penalty": -2.01}, "presence_penalty"),
        ({"presence_penalty": True}, "presence_penalty"),
        ({"frequency_penalty": 2.01}, "frequency_penalty"),
        ({"repetition_penalty": 0}, "repetition_penalty"),
        ({"repetition_penalty": -1.1}, "repetition_penalty"),
        ({"repetition_penalty": "1"}, "repetition_penalty"),
        ({"logit_bias": {"5": 100.1}}, "logit_bias.5"),
        ({"logit_bias": {"5": "1"}}, "logit_bias.5"),
        ({"logit_bias": [5]}, "logit_bias"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"logit_bias": {"05": 1}}, "logit_bias"),
        ({"logit_bias": {"\u0665": 1}}, "logit_bias"),
        ({"logit_bias": {"-1": 1}}, "logit_bias"),
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"logit_bias": {"9" * 9999: 1}}, "logit_bias"),
        ({"logit_bias": {str(i): "a" for i in range(1025)}}, "logit_bias"),
        ({"min_tokens": -1}, "min_tokens"),
        ({"min_tokens": 1.5}, "min_tokens"),
        ({"min_tokens": 8, "max_tokens": 7}, "min_tokens"),
        ({"min_tokens": 128}, "min_tokens"),
        ({"min_tokens": 10**400}, "min_tokens"),
        ({"stop_token_ids": [-1]}, "stop_token_ids"),
        ({"stop_token_ids": [99999]}, "stop_token_ids"),
        ({"stop_token_ids": [10**400]}, "stop_token_ids"),
        ({"stop_token_ids": [True]}, "stop_token_ids[0]"),
        ({"stop_token_ids": 5}, "stop_token_ids"),
        ({"stop_token_ids": [5] * 129}, "stop_token_ids"),
        ({"include_stop_str_in_output": 1}, "include_stop_str_in_output"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [5, 99999]}, "allowed_token_ids"),
        ({"allowed_token_ids": [10**400]}, "allowed_token_ids"),
        ({"allowed_token_ids": [True]}, "allowed_token_ids[0]"),
        ({"allowed_token_ids": [5] * 1025}, "allowed_token_ids"),
        ({"bad_words": "no"}, "bad_words"),
        ({"bad_words": [""]}, "bad_words[0]"),
        ({"bad_words": [" \n"]}, "bad_words"),
        ({"bad_words": ["\ud800"]}, "bad_words[0]"),
        ({"bad_words": ["a" * 1025]}, "bad_words[0]"),
        ({"bad_words": ["a"] * 129}, "bad_words"),
        ({"bad_words": [f"{i} is not a number" for i in range(128)]}, "bad_words"),
        ({"skip_special_tokens": 0}, "skip_special_tokens"),
        ({"return_token_ids": "yes"}, "return_token_ids"),
        ({"cache_salt": ""}, "cache_salt"),
        ({"cache_salt": "a" * 1025}, "cache_salt"),
        ({"cache_salt": "\ud800"}, "cache_salt"),
        ({"user": "a" * 1025}, "user"),
        ({"user": "\ud800"}, "user"),
        ({"user": 7}, "user"),
        ({"priority": 2**31}, "priority"),
        ({"priority": -(2**31) - 1}, "priority"),
        ({"priority": 1.5}, "priority"),
        ({"priority": True}, "priority"),
        ({"expected_output_tokens": 0}, "expected_output_tokens"),
        ({"expected_output_tokens": 10**400}, "expected_output_tokens"),
        ({"expected_output_tokens": "9"}, "expected_output_tokens"),
        ({"queue_timeout_s": 0}, "queue_timeout_s"),
        ({"queue_timeout_s": -1.5}, "queue_timeout_s"),
        ({"queue_timeout_s": 10**400}, "queue_timeout_s"),
        ({"queue_timeout_s": True}, "queue_timeout_s"),
        ({"n": 0}, "n"),
        ({"n": 129}, "n"),
        ({"n": True}, "n"),
        ({"n": 2.0}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"stop": ""}, "stop[0]"),
        ({"stop": ["a", ""]}, "stop[1]"),
        ({"stop": ["a"] * 17}, "stop"),
        ({"stop": ["a" * 1025]}, "stop[0]"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop": ["\ud800"]}, "stop[0]"),
        ({"stream": "yes"}, "stream"),
        ({"logprobs": 1}, "logprobs"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "top_logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"prompt_logprobs": 21}, "prompt_logprobs"),
        ({"prompt_logprobs": True}, "prompt_logprobs"),
        ({"prompt_logprobs": 0, "stream": True}, "prompt_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"usage": 1}}, "stream_options.usage"),
        (
            {"stream": True, "stream_options": {"continuous_usage_stats": True}},
            "stream_options.continuous_usage_stats",
        ),
        (
            {"stream": True, "stream_options": {"include_obfuscation": True}},
            "stream_options.include_obfuscation",
        ),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "user", "content": ""}] * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": []}] * 4097}, "messages"),
        ({"messages": [{"role": "user", "content": [TEXT] * 2049}] * 2}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": "\ud800"}]}, "messages[0].content[0].text"),
        ({"messages": [{"role": "function", "content": "x"}]}, "messages[0].role"),
        ({"messages": [*CHAT, {"role": "user", "content": [1]}]}, "messages[1].content[0]"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages[0].content[0].type",
        ),
        (
            {"messages": [{"role": "assistant", "content": "x", "tool_calls": [{"id": "1"}]}]},
            "messages[0].tool_calls[0].function",
        ),
        ({"messages": [{"role": "user", "content": "x", "name": "me"}]}, "messages[0].name"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(tokenizer, change, param):
    status, body, requests = post(tokenizer, CHAT_PATH, change)
    assert (status, body["error"]["param"]) == (400, param)
    assert requests == []


@pytest.mark.parametrize("num", [-1, 21, True, 1.5])
def test_a_completion_tells_of_at_most_20_likely_tokens(tokenizer, num):
    status, body, requests = post(tokenizer, COMPLETION_PATH, {"logprobs": num})
    assert (status, body["error"]["param"]) == (400, "logprobs")
    assert requests == []


@pytest.mark.parametrize(
    ("path", "change", "num"),
    [
        (CHAT_PATH, {}, None),
        (CHAT_PATH, {"logprobs": False, "top_logprobs": 0}, None),
        (CHAT_PATH, {"logprobs": True}, 0),
        (CHAT_PATH, {"logprobs": True, "top_logprobs": 20}, 20),
        (COMPLETION_PATH, {}, None),
        (COMPLETION_PATH, {"logprobs": 0}, 0),
        (COMPLETION_PATH, {"logprobs": 20}, 20),
    ],
)
def test_how_many_likely_tokens_to_tell_reaches_the_engine(tokenizer, path, change, num):
    assert request_for(tokenizer, path, change).sampling.num_logprobs == num


@pytest.mark.parametrize(
    ("path", "change", "num"),
    [
        (CHAT_PATH, {}, None),
        (CHAT_PATH, {"logprobs": True, "top_logprobs": 3}, None),
        (CHAT_PATH, {"prompt_logprobs": 0}, 0),
        (CHAT_PATH, {"prompt_logprobs": 20}, 20),
        (COMPLETION_PATH, {"logprobs": 3}, None),
        (COMPLETION_PATH, {"echo": True}, None),
        (COMPLETION_PATH, {"echo": True, "logprobs": 3}, 3),
        (COMPLETION_PATH, {"echo": True, "logprobs": 0}, 0),
        (COMPLETION_PATH, {"logprobs": 3, "prompt_logprobs": 0}, 0),
        (COMPLETION_PATH, {"echo": True, "logprobs": 3, "prompt_logprobs": 0}, 3),
        (COMPLETION_PATH, {"echo": True, "logprobs": 3, "prompt_logprobs": 5}, 5),
    ],
)
def test_how_many_likely_tokens_to_tell_of_a_prompt_reaches_the_engine(
    tokenizer, path, change, num
):
    status, body, requests = post(tokenizer, path, {"n": 3} | change)
    assert status == 200, body
    assert [request.num_prompt_logprobs for request in requests] == [num, None, None]


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 0, "echo": False, "prompt_logprobs": 1}, "max_tokens"),
        ({"max_tokens": -1, "echo": True}, "max_tokens"),
        ({"max_tokens": 0, "echo": True, "min_tokens": 1}, "min_tokens"),
        ({"max_tokens": 0, "echo": True, "prompt": [5] * 128}, "prompt"),
        ({"echo": 1}, "echo"),
        ({"echo": "true"}, "echo"),
    ],
)
def test_an_echo_is_one_or_none_and_only_it_may_come_alone(tokenizer, change, param):
    status, body, requests = post(tokenizer, COMPLETION_PATH, change)
    assert (status, body["error"]["param"]) == (400, param)
    assert requests == []


@pytest.mark.parametrize(
    "prompt",
    [
        None,
        "",
        "a\ud800",
        [],
        [[]],
        7,
        [1.5],
        [True],
        [["a"]],
        ["a", 1],
        ["a"] * 129,
        [5, -1],
        [10**9],
    ],
)
def test_a_prompt_that_is_none_is_refused(tokenizer, prompt):
    status, body, requests = post(tokenizer, COMPLETION_PATH, {"prompt": prompt})
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert requests == []


def test_prompts_are_counted_before_they_are_looked_at(tokenizer):
    status, body, _ = post(tokenizer, COMPLETION_PATH, {"prompt": [[1], *[None] * 128]})
    assert (status, body["error"]["param"]) == (400, "prompt")
    assert "at most 128 prompts, not 129" in body["error"]["message"]


def test_messages_of_which_the_chat_template_makes_nothing_are_refused():
    tokenizer = Tokenizer.load("package://gllm_ray/demo/model")
    tokenizer._tokenizer.chat_template = "{{ '' }}"
    status, body, requests = post(tokenizer, CHAT_PATH, {})
    assert (status, body["error"]["param"]) == (400, "messages")
    assert requests == []


def test_sampling_parameters_reach_the_engine(tokenizer):
    sampling = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125, "seed": -3}
    for path in BODIES:
        assert request_for(tokenizer, path, sampling).sampling == SamplingParams(**sampling)
        hot = request_for(tokenizer, path, {"temperature": 100}).sampling
        assert hot.temperature == 100


def test_a_top_k_of_any_size_becomes_one_that_a_message_can_carry(tokenizer):
    for path in BODIES:
        sampling = request_for(tokenizer, path, {"top_k": 2**70}).sampling
        sequence = ScheduledSequence(0, 0, 0, (1,), (0,), sampling)
        batch = MicroBatch(batch_id=0, sequences=(sequence,))
        assert MetadataDecoder().decode(MetadataEncoder().encode(batch)) == batch
        assert sampling.top_k > 10**9


def test_the_defaults_are_openais_with_a_seed_for_each_request(tokenizer):
    seeds = set()
    for path in BODIES:
        for change in ({}, {"top_k": -1}):
            sampling = request_for(tokenizer, path, change).sampling
            assert (sampling.temperature, sampling.top_p) == (1.0, 1.0)
            assert (sampling.top_k, sampling.min_p) == (0, 0.0)
            seeds.add(sampling.seed)
    assert len(seeds) == 4


def test_the_models_defaults_hold_where_a_request_leaves_a_parameter_out():
    tokenizer = Tokenizer.load("package://gllm_ray/demo/model")
    said = {"temperature": 0.5, "top_p": 0.25, "top_k": 7, "min_p": 0.125}
    penalty = {"repetition_penalty": 1.05}
    tokenizer.sampling_defaults = SamplingDefaults(**said, **penalty)
    openais = {"temperature": 1, "top_p": 1, "top_k": 0, "min_p": 0}
    for path in BODIES:
        for change in ({"seed": 1}, {"seed": 1} | dict.fromkeys(said | penalty)):
            sampling = request_for(tokenizer, path, change).sampling
            assert sampling == SamplingParams(**said, seed=1, logit_rules=LogitRules(**penalty))
        asked = openais | {"seed": 1, "repetition_penalty": 1}
        assert request_for(tokenizer, path, asked).sampling == SamplingParams(**openais, seed=1)


@pytest.mark.parametrize("path", BODIES)
def test_what_changes_the_logits_reaches_the_engine(tokenizer, path):
    penalties = {"presence_penalty": -2, "frequency_penalty": 2, "repetition_penalty": 1.5}
    request = request_for(tokenizer, path, penalties | {"logit_bias": {"0": -100, "7": 100}})
    assert request.sampling.logit_rules == LogitRules(**penalties, logit_bias=((0, -100), (7, 100)))
    for ignore_eos in (False, True):
        ends = {"min_tokens": 4, "max_tokens": 4, "stop_token_ids": [9, 5]}
        request = request_for(tokenizer, path, ends | {"ignore_eos": ignore_eos})
        all_ends = {5, 9} | tokenizer.stop_token_ids
        assert request.sampling.logit_rules == LogitRules(
            end_token_ids=tuple(sorted(all_ends)), min_end=len(request.prompt_token_ids) + 4
        )
        assert request.stop_token_ids == ({5, 9} if ignore_eos else all_ends)


def test_each_prompt_of_a_completion_has_a_least_length_of_its_own(tokenizer):
    change = {"prompt": [[5] * 3, [5] * 7], "min_tokens": 2, "stop_token_ids": [5]}
    status, body, requests = post(tokenizer, COMPLETION_PATH, change)
    assert status == 200, body
    assert [request.sampling.logit_rules.min_end for request in requests] == [5, 9]


@pytest.mark.parametrize("path", BODIES)
def test_as_many_biases_and_stop_tokens_as_may_be_are_accepted(tokenizer, path):
    biases = {str(token_id): 0.5 for token_id in range(1024)}
    change = {"logit_bias": biases, "stop_token_ids": list(range(128))}
    request = request_for(tokenizer, path, change)
    assert len(request.sampling.logit_rules.logit_bias) == 1024
    assert request.stop_token_ids >= set(range(128))


@pytest.mark.parametrize("path", BODIES)
def test_what_is_allowed_and_what_is_bad_reaches_the_engine(tokenizer, path):
    change = {"allowed_token_ids": [9, 5, 9, 0], "bad_words": ["def", " def", "import x"]}
    rules = request_for(tokenizer, path, change).sampling.logit_rules
    assert rules.allowed_token_ids == (0, 5, 9)
    spellings = ["def", " def", "import x", " import x"]
    assert set(rules.bad_words) == {tuple(tokenizer.encode(text)) for text in spellings}
    assert {len(word) for word in rules.bad_words} > {1}
    assert len(rules.bad_words) == 4


@pytest.mark.parametrize("path", BODIES)
def test_as_many_allowed_tokens_and_bad_words_as_may_be_are_accepted(tokenizer, path):
    change = {"allowed_token_ids": list(range(1024)), "bad_words": [f"{i}" for i in range(128)]}
    rules = request_for(tokenizer, path, change).sampling.logit_rules
    assert len(rules.allowed_token_ids) == 1024
    assert len(rules.bad_words) == 256


def test_the_end_tokens_stop_unless_they_are_ignored(tokenizer):
    for path in BODIES:
        assert request_for(tokenizer, path, {}).stop_token_ids == tokenizer.stop_token_ids != set()
        ignoring = {"ignore_eos": True, "max_tokens": 4}
        assert request_for(tokenizer, path, ignoring).stop_token_ids == set()


@pytest.mark.parametrize("path", BODIES)
def test_a_model_that_is_alone_need_not_be_named(tokenizer, path):
    status, body, _ = post(tokenizer, path, {"model": None})
    assert (status, body["model"]) == (200, LocalService.model_name)


def test_the_cache_salt_reaches_the_engine(tokenizer):
    for path in BODIES:
        assert request_for(tokenizer, path, {}).cache_salt == ""
        assert request_for(tokenizer, path, {"cache_salt": "tenant"}).cache_salt == "tenant"


@pytest.mark.parametrize("path", BODIES)
def test_what_orders_the_queue_reaches_the_engine(tokenizer, path):
    request = request_for(tokenizer, path, {})
    assert (request.priority, request.tenant) == (0, "")
    assert (request.expected_output_tokens, request.queue_timeout_s) == (None, None)
    change = {"priority": -(2**31), "user": "me", "expected_output_tokens": 7}
    request = request_for(tokenizer, path, change | {"queue_timeout_s": 60})
    assert (request.priority, request.tenant) == (-(2**31), "me")
    assert (request.expected_output_tokens, request.queue_timeout_s) == (7, 60.0)


def test_a_best_of_that_drops_no_output_is_accepted(tokenizer):
    change = {"n": 3, "best_of": 3}
    status, body, requests = post(tokenizer, COMPLETION_PATH, change)
    assert (status, len(body["choices"]), len(requests)) == (200, 3, 3)


@pytest.mark.parametrize("change", [{"best_of": 3}, {"n": 2, "best_of": 3}, {"n": 3, "best_of": 1}])
def test_any_other_best_of_is_refused_by_name(tokenizer, change):
    status, body, requests = post(tokenizer, COMPLETION_PATH, change)
    assert (status, body["error"]["param"]) == (400, "best_of")
    assert body["error"]["code"] == "unsupported_parameter"
    assert requests == []


@pytest.mark.parametrize(("num_prompts", "n", "is_accepted"), [(16, 8, True), (43, 3, False)])
def test_a_body_asks_for_at_most_128_outputs(tokenizer, num_prompts, n, is_accepted):
    change = {"prompt": ["a"] * num_prompts, "n": n}
    status, body, requests = post(tokenizer, COMPLETION_PATH, change)
    if is_accepted:
        assert (status, len(requests)) == (200, num_prompts * n)
        return
    assert (status, body["error"]["param"], requests) == (400, "n", [])
    assert body["error"]["message"] == (
        "n=3 for each of 43 prompts comes to 129 outputs; the limit is 128, so send fewer prompts "
        "or a smaller n"
    )


def test_the_limit_of_tokens_is_the_clients_or_the_default(tokenizer):
    num_prompt = len(tokenizer.apply_chat_template(CHAT))
    for name in ("max_tokens", "max_completion_tokens"):
        assert request_for(tokenizer, CHAT_PATH, {name: 9}).max_tokens == 9
    both = {"max_tokens": 9, "max_completion_tokens": 9}
    assert request_for(tokenizer, CHAT_PATH, both).max_tokens == 9
    assert request_for(tokenizer, CHAT_PATH, {}).max_tokens == 128 - num_prompt
    assert request_for(tokenizer, COMPLETION_PATH, {"max_tokens": 9}).max_tokens == 9
    assert request_for(tokenizer, COMPLETION_PATH, {}).max_tokens == 16
    almost_full = {"prompt": [5] * 120}
    assert request_for(tokenizer, COMPLETION_PATH, almost_full).max_tokens == 8


def test_text_parts_are_one_text_and_the_developer_speaks_as_the_system(tokenizer):
    parts = [{"type": "text", "text": "a b"}, {"type": "text", "text": " c"}]
    change = {"messages": [{"role": "developer", "content": parts}, *CHAT]}
    whole = [{"role": "system", "content": "a b c"}, *CHAT]
    expected = tuple(tokenizer.apply_chat_template(whole))
    assert request_for(tokenizer, CHAT_PATH, change).prompt_token_ids == expected


@pytest.mark.parametrize(
    ("path", "change", "param", "words"),
    [
        (CHAT_PATH, {"max_tokens": 128}, "messages", "128 in the completion"),
        (CHAT_PATH, {"messages": [{"role": "user", "content": "a b " * 99}]}, "messages", "1 in"),
        (COMPLETION_PATH, {"prompt": [5] * 120, "max_tokens": 9}, "prompt", "(120 in the prompt"),
        (COMPLETION_PATH, {"prompt": [5] * 128}, "prompt", "you requested 129 tokens"),
        (COMPLETION_PATH, {"prompt": "a" * 10**5}, "prompt", "100000 characters"),
        (COMPLETION_PATH, {"prompt": ["a", [5] * 200]}, "prompt", "200 in the prompt"),
    ],
)
def test_what_does_not_fit_the_context_is_refused_in_openais_words(
    tokenizer, path, change, param, words
):
    status, body, requests = post(tokenizer, path, change)
    error = body["error"]
    assert (status, error["code"], error["param"]) == (400, "context_length_exceeded", param)
    assert error["message"].startswith("This model's maximum context length is 128 tokens. However")
    assert words in error["message"]
    assert requests == []
