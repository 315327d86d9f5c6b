"""A service with API keys answers whoever shows one, and nobody else."""

import asyncio

import openai
import pytest

from gllm_ray.config import ModelsConfig, ServiceConfig
from gllm_ray.errors import ConfigError
from gllm_ray.serving.api_keys import read_api_keys
from gllm_ray.strict_schema import parse_strictly
from tests.serving.local_api import BODIES, local_api

KEYS = ("first-key", "second-key")


def statuses(tokenizer, path, *authorizations, api_keys=KEYS):
    async def main():
        async with local_api(tokenizer, "x", api_keys=api_keys) as (_, http):
            found = []
            for value in authorizations:
                headers = {} if value is None else {"Authorization": value}
                if path in BODIES:
                    response = await http.post(path, json=BODIES[path], headers=headers)
                else:
                    response = await http.get(path, headers=headers)
                found.append(response.status_code)
            return found

    return asyncio.run(main())


@pytest.mark.parametrize("path", [*BODIES, "/v1/models", "/server_info", "/version"])
def test_each_key_opens_every_route_and_nothing_else_does(tokenizer, path):
    wrong = [None, "", "Bearer", "Bearer ", "Bearer first", "Bearer first-keyx", "first-key"]
    wrong += ["Basic first-key", "Bearer first-key second-key", "Bearer f\u00efrst"]
    wrong = [value if value is None else value.encode("latin-1") for value in wrong]
    right = ["Bearer first-key", "bearer  second-key "]
    assert statuses(tokenizer, path, *wrong, *right) == [401] * len(wrong) + [200] * len(right)


def test_a_path_that_does_not_exist_tells_strangers_no_more_than_one_that_does(tokenizer):
    assert statuses(tokenizer, "/v1/nothing", None, "Bearer first-key") == [401, 404]


@pytest.mark.parametrize("path", ["/health", "/ping"])
def test_health_needs_no_key(tokenizer, path):
    assert statuses(tokenizer, path, None) == [200]


def test_without_keys_none_is_asked_for(tokenizer):
    assert statuses(tokenizer, "/v1/models", None, "Bearer x", api_keys=()) == [200, 200]


def test_the_official_client_is_refused_in_its_own_words(tokenizer):
    async def main():
        async with local_api(tokenizer, "x", api_keys=KEYS) as (_, http):
            options = {"base_url": "http://test/v1", "http_client": http, "max_retries": 0}
            models = await openai.AsyncOpenAI(api_key="second-key", **options).models.list()
            assert len(models.data) == 1
            with pytest.raises(openai.AuthenticationError) as caught:
                await openai.AsyncOpenAI(api_key="wrong", **options).models.list()
            assert caught.value.code == "invalid_api_key"
            assert caught.value.response.headers["www-authenticate"] == "Bearer"

    asyncio.run(main())


def test_keys_come_from_the_environment_of_the_replica(monkeypatch):
    monkeypatch.setenv("SOME_KEYS", " one two\nthree ")
    assert read_api_keys("SOME_KEYS") == ("one", "two", "three")
    assert read_api_keys(None) == ()


@pytest.mark.parametrize("value", [None, "", " \n", "k\u00e9y", "a\x7fb"])
def test_a_service_that_should_have_keys_does_not_start_without_usable_ones(value, monkeypatch):
    monkeypatch.delenv("SOME_KEYS", raising=False)
    if value is not None:
        monkeypatch.setenv("SOME_KEYS", value)
    with pytest.raises(ConfigError, match="api_key_env='SOME_KEYS'"):
        read_api_keys("SOME_KEYS")


@pytest.mark.parametrize(("key", "value"), [("api_key_env", "KEYS"), ("allowed_origins", ["*"])])
def test_of_a_service_with_a_front_end_that_says_who_may_ask(key, value):
    model = {"model": {"path": "m"}, "deployment": {key: value}}
    said = getattr(parse_strictly(ServiceConfig, model).deployment, key)
    assert said
    with pytest.raises(ConfigError, match=rf"must be frontend\.{key}"):
        parse_strictly(ModelsConfig, {"models": [model]})
    front = {"frontend": {key: value}, "models": [{"model": {"path": "m"}}]}
    assert getattr(parse_strictly(ModelsConfig, front).frontend, key) == said
