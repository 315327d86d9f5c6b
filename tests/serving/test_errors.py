"""Every error has OpenAI's shape, is bounded, and tells nothing it should not."""

import asyncio
import json
import logging

import httpx
import pytest
from fastapi import FastAPI
from pydantic import ValidationError

from gllm_ray.errors import (
    ConfigError,
    GllmRayError,
    InvalidRequestError,
    OverloadedError,
    PipelineError,
    SchedulerLostError,
    StageLostError,
    StagesFailedError,
    StageTimeoutError,
)
from gllm_ray.serving.errors import install_error_handlers
from gllm_ray.serving.openai_protocol import ChatCompletionRequest
from tests.serving.local_api import BODIES, local_api

CHAT_PATH, COMPLETION_PATH = BODIES
JSON = {"Content-Type": "application/json"}


def call(tokenizer, method, path, *, max_body_bytes=2**20, **request):
    async def main():
        async with local_api(tokenizer, "x", max_body_bytes=max_body_bytes) as (_, http):
            return await http.request(method, path, **request)

    return asyncio.run(main())


def error_of(response):
    """The error of a response, which must have the shape that clients parse."""
    assert response.headers["content-type"] == "application/json"
    (error,) = response.json().values()
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str)
    assert isinstance(error["type"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    return error


TABLE = [
    (InvalidRequestError("no", param="p", code="c"), 400, "c", None),
    (InvalidRequestError("no", code="model_not_found"), 404, "model_not_found", None),
    (OverloadedError("full", retry_after_s=1.2), 429, "server_busy", "2"),
    (PipelineError("broke"), 503, "engine_unavailable", "5"),
    (StageLostError("broke"), 503, "engine_unavailable", "5"),
    (SchedulerLostError("broke"), 503, "engine_unavailable", "5"),
    (StageTimeoutError("hangs"), 503, "engine_unavailable", "5"),
    (StagesFailedError("two of them"), 503, "engine_unavailable", "5"),
    (ConfigError("/secret/path"), 500, "server_error", None),
    (ZeroDivisionError("/secret/path"), 500, "server_error", None),
]


def raised_in_a_route(error):
    app = FastAPI()
    install_error_handlers(app)

    @app.get("/")
    async def fail():
        raise error

    async def main():
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as http:
            return await http.get("/")

    return asyncio.run(main())


@pytest.mark.parametrize(("error", "status", "code", "retry_after"), TABLE)
def test_every_exception_has_its_status_and_code(error, status, code, retry_after):
    response = raised_in_a_route(error)
    assert (response.status_code, error_of(response)["code"]) == (status, code)
    assert response.headers.get("retry-after") == retry_after
    assert "secret" not in response.text


def test_the_table_knows_every_error_of_ours():
    def leaves(kind):
        return {kind}.union(*(leaves(child) for child in kind.__subclasses__()))

    # Ray derives classes of its own from ours.
    ours = {kind for kind in leaves(GllmRayError) if kind.__module__ == GllmRayError.__module__}
    known = {type(error) for error, *_ in TABLE}
    assert ours - {GllmRayError} == known - {ZeroDivisionError}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1/nothing", 404),
        ("POST", "/", 404),
        ("GET", CHAT_PATH, 405),
        ("PUT", "/health", 405),
    ],
)
def test_a_path_or_method_that_is_not_served_says_so_in_the_same_shape(
    tokenizer, method, path, status
):
    response = call(tokenizer, method, path)
    assert response.status_code == status
    error = error_of(response)
    assert error["type"] == "invalid_request_error"
    assert error["message"].startswith(f"{method} {path} is not served; ")
    assert ("allow" in response.headers) == (status == 405)


def test_a_path_that_is_not_served_is_told_which_are(tokenizer):
    message = error_of(call(tokenizer, "POST", "/v1/embeddings"))["message"]
    for route in ("POST /v1/chat/completions", "GET /v1/models", "POST /tokenize", "GET /health"):
        assert route in message
    message = error_of(call(tokenizer, "GET", COMPLETION_PATH))["message"]
    assert message.endswith("; use POST")
    assert len(call(tokenizer, "GET", "/" + "a" * 50_000).content) < 3000


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"[]",
        b'"text"',
        b"null",
        b"\xff\xfe\xff",
        b'{"model": "m", "model": }',
        b"[" * 100_000,
        b'{"max_tokens": ' + b"9" * 5000 + b"}",
        b'{"\\ud800": 1}',
    ],
)
@pytest.mark.parametrize("path", BODIES)
def test_a_body_that_is_no_json_object_is_a_bad_request(tokenizer, path, content):
    response = call(tokenizer, "POST", path, content=content, headers=JSON)
    assert (response.status_code, error_of(response)["code"]) == (400, "invalid_json")


def test_broken_json_is_told_what_was_expected_and_at_which_character(tokenizer):
    response = call(tokenizer, "POST", CHAT_PATH, content=b"{'model': 1}", headers=JSON)
    assert error_of(response)["message"] == (
        "the body is not valid JSON: Expecting property name enclosed in double quotes "
        "(character 2)"
    )


def test_a_body_of_another_type_is_told_which_type_is_needed(tokenizer):
    content = json.dumps(BODIES[CHAT_PATH])
    for headers in ({"Content-Type": "application/x-www-form-urlencoded"}, {}):
        response = call(tokenizer, "POST", CHAT_PATH, content=content, headers=headers)
        assert response.status_code == 400
        assert "application/json" in error_of(response)["message"]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e400"])
def test_a_number_that_is_none_is_refused_by_name(tokenizer, number):
    content = json.dumps(BODIES[CHAT_PATH])[:-1] + f', "temperature": {number}}}'
    response = call(tokenizer, "POST", CHAT_PATH, content=content, headers=JSON)
    assert (response.status_code, error_of(response)["param"]) == (400, "temperature")


@pytest.mark.parametrize(
    "body",
    [
        BODIES[CHAT_PATH] | {f"unknown_{index}": "x" for index in range(100)},
        BODIES[CHAT_PATH] | {"k" * 500_000: 1},
        BODIES[CHAT_PATH] | {"model": "m" * 500_000},
        BODIES[CHAT_PATH] | {"messages": [{"role": "r" * 90_000, "content": 1}] * 10},
        BODIES[CHAT_PATH] | {"temperature": 10**4000},
    ],
)
def test_what_is_echoed_is_bounded(tokenizer, body):
    response = call(tokenizer, "POST", CHAT_PATH, json=body)
    assert response.status_code in (400, 404)
    error_of(response)
    assert len(response.content) < 3000


@pytest.mark.parametrize(
    "mistakes",
    [
        {"unknown": {str(index): index for index in range(50_000)}},
        {str(index): index for index in range(50_000)},
        {"messages": [{}] * 50_000},
        {"messages": [{"role": "user", "content": [1] * 50_000}]},
        {"messages": [{"role": "user", "content": "x"} | dict.fromkeys(map(str, range(50_000)))]},
        {"stop": [1] * 50_000},
        {"stop_token_ids": ["1"] * 50_000},
        {"logit_bias": {str(index): "1" for index in range(50_000)}},
        {"chat_template_kwargs": {str(index): [] for index in range(50_000)}},
        {"tools": [{}] * 50_000},
        {"structured_outputs": {"choice": [1] * 50_000}},
        {"model": "x", "stream_options": dict.fromkeys(map(str, range(50_000)))},
    ],
)
def test_a_body_full_of_mistakes_is_given_up_early(mistakes):
    with pytest.raises(ValidationError) as caught:
        ChatCompletionRequest.model_validate(BODIES[CHAT_PATH] | mistakes)
    assert caught.value.error_count() <= 16


def test_a_body_with_too_many_keys_says_so(tokenizer):
    response = call(tokenizer, "POST", CHAT_PATH, json={str(index): 0 for index in range(129)})
    assert error_of(response)["message"] == "the body must have at most 128 keys, not 129"


def test_a_message_that_quotes_a_client_is_bounded():
    response = raised_in_a_route(InvalidRequestError("m" * 10**6, param="p" * 10**6))
    assert len(response.content) < 3000


def test_the_first_mistakes_are_all_told(tokenizer):
    body = BODIES[CHAT_PATH] | {"temperature": 101, "top_p": -1, "typo": 1}
    message = error_of(call(tokenizer, "POST", CHAT_PATH, json=body))["message"]
    assert message == (
        "temperature=101: must be at most 100; "
        "top_p=-1: must be above 0; "
        "typo=1: is not a known parameter"
    )


SCHEMA_WORDS = "must be a JSON schema: an object, or its text"
VARIABLE_WORDS = "must be a number, true, false, null, or a text of at most 1024 characters"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"stream": 1}, "stream=1: must be true or false, not a number"),
        ({"max_tokens": "5"}, "max_tokens: must be a whole number, not text"),
        ({"max_tokens": 5.0}, "max_tokens=5.0: must be a whole number, not a decimal number"),
        ({"n": 0}, "n=0: must be at least 1"),
        ({"seed": 2**63}, f"seed={2**63}: must be below {2**63}"),
        ({"model": 5}, "model=5: must be text, not a number"),
        ({"logit_bias": {"5": True}}, "logit_bias.5=true: must be a number, not a truth value"),
        ({"logit_bias": {"5": 101}}, "logit_bias.5=101: must be at most 100"),
        ({"stop": 5}, "stop=5: must be text or a list of texts"),
        ({"stop": ["a"] * 17}, "stop: must have at most 16 items, not 17"),
        ({"stop": ["a", ""]}, "stop[1]: must have 1 or more characters"),
        ({"stop": ["a" * 1025]}, "stop[0]: must have at most 1024 characters"),
        ({"stop": ["\ud800"]}, "stop[0]: must be valid Unicode"),
        ({"stream_options": []}, "stream_options: must be an object, not a list"),
        ({"messages": []}, "messages: must have 1 or more items, not 0"),
        ({"messages": {}}, "messages: must be a list, not an object"),
        (
            {"response_format": {"type": "json"}},
            "response_format.type: must be 'text', 'json_object' or 'json_schema', not 'json'",
        ),
        (
            {"response_format": {"type": ["text"]}},
            "response_format.type: must be 'text', 'json_object' or 'json_schema', not a list",
        ),
        ({"structured_outputs": {"json": 5}}, f"structured_outputs.json=5: {SCHEMA_WORDS}"),
        ({"structured_outputs": {"json": [{}]}}, f"structured_outputs.json: {SCHEMA_WORDS}"),
        (
            {"structured_outputs": {"choice": "a"}},
            "structured_outputs.choice: must be a list, not text",
        ),
        ({"chat_template_kwargs": {"a": []}}, f"chat_template_kwargs.a: {VARIABLE_WORDS}"),
        ({"chat_template_kwargs": {"a": "x" * 1025}}, f"chat_template_kwargs.a: {VARIABLE_WORDS}"),
        ({"tool_choice": 5}, "tool_choice=5: must be an object, not a number"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "tools[0].function.name: must match ^[a-zA-Z0-9_-]{1,64}$",
        ),
        ({"guided_json": {}}, "guided_json: is not supported; use structured_outputs.json"),
        ({"functions": [{}]}, "functions: is not supported; use tools"),
        ({"metadata": {"a": "b"}}, "metadata: is not supported; leave it out"),
    ],
)
def test_a_mistake_says_what_was_given_and_what_would_be_right(tokenizer, change, message):
    content = json.dumps(BODIES[CHAT_PATH] | change)  # ASCII, for half of a surrogate pair
    response = call(tokenizer, "POST", CHAT_PATH, content=content, headers=JSON)
    assert (response.status_code, error_of(response)["message"]) == (400, message)


@pytest.mark.parametrize("schema", ["no JSON", "[1]", "5"])
def test_the_text_of_a_schema_has_to_be_an_object(tokenizer, schema):
    body = BODIES[COMPLETION_PATH] | {"structured_outputs": {"json": schema}}
    error = error_of(call(tokenizer, "POST", COMPLETION_PATH, json=body))
    assert error["param"] == "structured_outputs"
    assert "json must be a JSON schema, the text of an object: " in error["message"]


@pytest.mark.parametrize("number", ["NaN", "-Infinity"])
def test_a_template_is_told_no_number_that_is_none(tokenizer, number):
    content = json.dumps(BODIES[CHAT_PATH])[:-1] + f', "chat_template_kwargs": {{"a": {number}}}}}'
    response = call(tokenizer, "POST", CHAT_PATH, content=content, headers=JSON)
    error = error_of(response)
    assert (error["param"], error["code"]) == ("chat_template_kwargs.a", "invalid_value")


@pytest.mark.parametrize("is_chunked", [True, False])
def test_no_more_of_a_body_is_read_than_it_may_have(tokenizer, is_chunked):
    num_sent = 0

    async def pieces():
        nonlocal num_sent
        for _ in range(100):
            num_sent += 1
            yield b" " * 1000

    async def main():
        async with local_api(tokenizer, "x", max_body_bytes=10_000) as (_, http):
            content = pieces() if is_chunked else b" " * 100_000
            return await http.post(CHAT_PATH, content=content, headers=JSON)

    response = asyncio.run(main())
    assert response.status_code == 413
    assert "10000 bytes" in error_of(response)["message"]
    assert num_sent <= 12


def test_a_body_of_just_the_limit_is_read(tokenizer):
    content = json.dumps(BODIES[CHAT_PATH]).encode()
    for limit, status in ((len(content), 200), (len(content) - 1, 413)):
        response = call(
            tokenizer, "POST", CHAT_PATH, content=content, headers=JSON, max_body_bytes=limit
        )
        assert response.status_code == status


def test_no_prompt_or_answer_is_logged(tokenizer, caplog):
    caplog.set_level(logging.DEBUG)

    async def main():
        chat = BODIES[CHAT_PATH] | {"messages": [{"role": "user", "content": "secret question"}]}
        async with local_api(tokenizer, "secret answer") as (service, http):
            for change in ({}, {"stream": True}, {"temperature": 101}, {"max_tokens": 10**6}):
                response = await http.post(CHAT_PATH, json=chat | change)
                assert "secret question" not in response.text
            service.tokenizer = None
            response = await http.post(CHAT_PATH, json=chat)
            assert response.status_code == 500

    asyncio.run(main())
    assert "secret" not in caplog.text
