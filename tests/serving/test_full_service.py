"""A service whose KV cache holds one prompt at a time: who waits, in which order, how long."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from gllm_ray.scheduling import QueueLimits
from tests.serving.local_api import BODIES, local_api, wait_until

_, COMPLETION_PATH = BODIES
PROMPT = [5] * 20


@asynccontextmanager
async def full_service(tokenizer, **options):
    """Yield a service held at its first micro-batch, and a function that sends a request to it."""
    names, calls = [], []
    async with local_api(
        tokenizer, script=[5], hold_after=0, num_blocks=8, max_model_len=30, **options
    ) as (service, http):

        async def ask(name, change):
            body = BODIES[COMPLETION_PATH] | {"prompt": PROMPT, "max_tokens": 2}
            response = await http.post(COMPLETION_PATH, json=body | change)
            names.append((name, response.status_code))
            return response

        async def send(name, **change):
            """Send a request, and return its call once it waits or is answered."""
            call = asyncio.create_task(ask(name, change))
            num_requests = len(service.requests) + 1
            calls.append(call)
            await wait_until(lambda: call.done() or service.scheduler.num_requests == num_requests)
            return call

        async def ends():
            """Let the pipeline go on; the names and states in the order in which they ended."""
            service.pipeline.release()
            await asyncio.gather(*calls)
            await service.until_idle()
            return names

        yield send, ends


def test_a_request_that_finds_the_queue_full_is_refused_and_the_others_end(tokenizer):
    async def main():
        async with full_service(tokenizer, queue=QueueLimits(max_requests=1)) as (send, ends):
            await send("served")
            await send("waiting")
            refused = await (await send("refused"))
            assert refused.json()["error"]["code"] == "server_busy"
            assert "the limit is 1" in refused.json()["error"]["message"]
            assert refused.headers["retry-after"] == "1"
            assert await ends() == [("refused", 429), ("served", 200), ("waiting", 200)]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("limits", "change"),
    [(QueueLimits(), {"queue_timeout_s": 0.02}), (QueueLimits(timeout_s=0.02), {})],
    ids=["the request's limit", "the service's limit"],
)
@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_request_that_waits_too_long_is_given_up(tokenizer, limits, change, is_streamed):
    async def main():
        async with full_service(tokenizer, queue=limits) as (send, ends):
            await send("served")
            expired = await (await send("expired", stream=is_streamed, **change))
            assert expired.json()["error"]["code"] == "server_busy"
            assert expired.headers["retry-after"] == "1"
            assert await ends() == [("expired", 429), ("served", 200)]

    asyncio.run(main())


def test_a_lower_priority_number_is_served_first(tokenizer):
    async def main():
        async with full_service(tokenizer) as (send, ends):
            for name, priority in [("first", 0), ("last", 5), ("soon", -5), ("later", 0)]:
                await send(name, priority=priority)
            assert [name for name, _ in await ends()] == ["first", "soon", "later", "last"]

    asyncio.run(main())


@pytest.mark.parametrize(
    ("fair_share", "order"),
    [(False, ["a", "a2", "a3", "b"]), (True, ["a", "a2", "b", "a3"])],
)
def test_users_take_turns_where_prefill_is_shared_fairly(tokenizer, fair_share, order):
    async def main():
        async with full_service(tokenizer, fair_share=fair_share) as (send, ends):
            for name in ("a", "a2", "a3", "b"):
                await send(name, user=name[0])
            assert [name for name, _ in await ends()] == order

    asyncio.run(main())


@pytest.mark.parametrize(("num_prompt_tokens", "num_shared"), [(10, 9), (8, 7)])
def test_the_outputs_of_a_prompt_compute_it_once(tokenizer, num_prompt_tokens, num_shared):
    async def main():
        options = {"script": [5], "prefix_caching": True}
        async with local_api(tokenizer, **options) as (service, http):
            prompt = list(range(5, 5 + num_prompt_tokens))
            body = BODIES[COMPLETION_PATH] | {"prompt": prompt, "max_tokens": 3, "n": 4}
            response = await http.post(COMPLETION_PATH, json=body)
            assert response.json()["usage"]["completion_tokens"] == 12
            assert service.scheduler.load().num_prefix_hit_tokens == 3 * num_shared

    asyncio.run(main())
