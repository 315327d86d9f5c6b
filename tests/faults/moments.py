"""The moments of a request's life at which something may die, and requests that are there."""

import asyncio

from tests.faults.api import complete


def body_of(index, *, num_tokens=40, **options):
    """Greedy and seeded ones in turn."""
    sampling = {"temperature": 1.0, "seed": 17} if index % 2 else {"temperature": 0}
    prompt = [5 + (7 * index + 13 * i) % 900 for i in range(num_tokens)]
    return {"model": "demo", "prompt": prompt, "max_tokens": 40} | sampling | options


MOMENTS = {
    # More than the KV cache has room for, so that the last ones wait.
    "queued": [body_of(i, num_tokens=800, max_tokens=20) for i in range(8)],
    "prefill": [body_of(i, num_tokens=300) for i in range(4)],
    "decode": [body_of(i) for i in range(4)],
    "streaming": [body_of(i, stream=True) for i in range(4)],
}
# Else only the first run of a prompt would prefill it.
SCHEDULER = {"prefix_caching": False}


async def complete_all(http, moment):
    """What each client of a moment gets."""
    return await asyncio.gather(*(complete(http, body) for body in MOMENTS[moment]))


async def reach(http, moment):
    """Return when the requests of a moment have come so far."""
    while (await load_of(http))["num_requests"] < len(MOMENTS[moment]):  # noqa: ASYNC110
        await asyncio.sleep(0.002)
    if moment == "queued":
        assert (await load_of(http))["num_waiting_requests"]
    if moment in ("decode", "streaming"):
        await complete(http, body_of(9, max_tokens=5))  # it came last, and is served in turn


async def load_of(http):
    """How much the engine holds."""
    return (await http.get("/server_info")).json()["load"]
