"""Web pages of allowed origins may ask from a browser, and others may not."""

import asyncio

import pytest

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import ConfigError
from gllm_ray.strict_schema import parse_strictly
from tests.serving.local_api import BODIES, local_api

PAGE = "https://chat.example.com"
PATH = "/v1/chat/completions"


def ask(tokenizer, origin, **options):
    """What a browser asks for a page: whether it may, and then, with a key."""

    async def main():
        async with local_api(tokenizer, "Hello", **options) as (_, http):
            headers = {"Origin": origin}
            asked = {
                "Access-Control-Request-Method": "POST",
                "Access-Control-Request-Headers": "authorization, content-type",
            }
            before = await http.options(PATH, headers=headers | asked)
            key = {"Authorization": "Bearer key"}
            return before, await http.post(PATH, json=BODIES[PATH], headers=headers | key)

    return asyncio.run(main())


@pytest.mark.parametrize("allowed", [PAGE, "*"])
def test_a_page_of_an_allowed_origin_may_ask_and_show_a_key(tokenizer, allowed):
    before, answer = ask(tokenizer, PAGE, allowed_origins=(allowed,), api_keys=("key",))
    assert before.status_code == answer.status_code == 200
    assert before.headers["access-control-allow-origin"] == allowed
    assert "authorization" in before.headers["access-control-allow-headers"]
    assert answer.headers["access-control-allow-origin"] == allowed


@pytest.mark.parametrize("allowed", [(), ("https://other.example.com",)])
def test_a_page_of_any_other_origin_is_not_told_that_it_may(tokenizer, allowed):
    before, answer = ask(tokenizer, PAGE, allowed_origins=allowed)
    assert before.status_code >= 400
    for response in (before, answer):
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize("origin", ["chat.example.com", "https://a.example.com/", "https://*", ""])
def test_what_is_no_origin_is_refused_at_start(origin):
    with pytest.raises(ConfigError, match=r"allowed_origins\[0\]"):
        parse_strictly(
            ServiceConfig, {"model": {"path": "m"}, "deployment": {"allowed_origins": [origin]}}
        )
