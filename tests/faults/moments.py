"""The moments of a request's life at which something may die, and requests that are there."""

import asyncio

from tests.faults.api import complete

NUM_REQUESTS = 8
# Long enough to be under way when something dies, and of an end.
SCHEMA = {
    "type": "array",
    "items": {"type": "integer", "minimum": 100, "maximum": 999},
    "minItems": 9,
    "maxItems": 9,
}
MOMENTS = {
    # More than the KV cache has room for, so that the last ones wait.
    "queued": {"num_tokens": 800, "max_tokens": 20},
    "prefill": {"num_tokens": 300},
    "decode": {},
    "streaming": {"stream": True},
    "structured": {
        "stream": True,
        "max_tokens": 120,
        "logprobs": 2,
        "response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": SCHEMA}},
    },
}


def body_of(moment, index, salt, *, num_tokens=40, **options):
    """Greedy and seeded ones in turn, long enough to meet; no two prompts begin alike."""
    sampling = {"temperature": 1.0, "seed": 17} if index % 2 else {"temperature": 0}
    start = 7 * index + 101 * (len(MOMENTS) * salt + list(MOMENTS).index(moment))
    prompt = [5 + (start + 13 * i) % 900 for i in range(num_tokens)]
    return {"model": "demo", "prompt": prompt, "max_tokens": 120} | sampling | options


async def complete_all(http, moment, salt=0, *, may_fail=False):
    """What each client of a moment gets; a salt makes prompts that nobody has computed."""
    indices = range(NUM_REQUESTS)
    bodies = (body_of(moment, index, salt, **MOMENTS[moment]) for index in indices)
    answers = (complete(http, body) for body in bodies)
    return await asyncio.gather(*answers, return_exceptions=may_fail)


async def load_of(http):
    """How much the engine holds."""
    return (await http.get("/server_info")).json()["load"]


async def reach(http, moment, salt=0, load_of=load_of):
    """Return when the requests of a moment have come so far."""
    while (await load_of(http))["num_requests"] < NUM_REQUESTS:  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    if moment == "queued":
        assert (await load_of(http))["num_waiting_requests"]
    if moment in ("decode", "streaming", "structured"):
        # It came last, and is served in turn.
        await complete(http, body_of(moment, NUM_REQUESTS, salt, max_tokens=5))
