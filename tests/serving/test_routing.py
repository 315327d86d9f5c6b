"""What the router inside a Serve handle sees of a request."""

import asyncio

from ray.serve._private.common import RequestMetadata
from ray.serve.request_router import PendingRequest

from gllm_ray.messages import GenerationRequest
from gllm_ray.serving.routing import _prompt

TOKENS = tuple(range(200))


def keys(*args, **metadata):
    async def see():
        request = PendingRequest(
            args=list(args),
            kwargs={},
            metadata=RequestMetadata(request_id="r", internal_request_id="i", **metadata),
        )
        return _prompt(request).keys

    return asyncio.run(see())


def generation(token_ids=TOKENS, **options):
    options = {"request_id": "r", "prompt_token_ids": token_ids, "max_tokens": 4} | options
    return GenerationRequest(**options)


def test_a_generation_request_shows_its_prompt_and_its_salt():
    longer = keys(generation((*TOKENS, *TOKENS)))
    assert len(keys(generation())) == 3
    assert longer[:3] == keys(generation())
    assert not set(keys(generation(cache_salt="s"))) & set(longer)


def test_an_http_request_shows_its_session_alone():
    assert keys(b"a pickled scope", session_id="one") == ("one",)
    assert keys(b"a pickled scope") == ()
