"""A replica behind a front end, then the front end itself, killed at each moment of a request.

Prints what came of it. A process of its own, because it needs a Serve of its own.
"""

import asyncio
import json
import logging
import sys
import time

import httpx
import ray
from ray import serve

from gllm_ray.config import FRONT_END_NAME
from gllm_ray.serving.app import build_app
from tests.e2e.front_end import MODEL, NAME, kill, pids
from tests.faults.moments import MOMENTS, complete_all, reach
from tests.faults.replicas import DEMO_MODEL, check_nothing_is_left_behind
from tests.local_ray import local_ray, started_serve

LIMIT_S = 60


def deploy():
    config = {
        "model": {"path": DEMO_MODEL, "served_name": MODEL, "dtype": "float32"},
        "pipeline": {"device": "cpu", "num_stages": 2, "cpus_per_stage": 0.5},
        "kv_cache": {"kv_cache_bytes": "8MiB"},
    }
    serve.run(build_app({"models": [config]}), name=NAME, route_prefix="/")


async def load_of(_http) -> dict:
    handle = serve.get_deployment_handle(MODEL, NAME)
    return (await handle.server_info.remote())["load"]


async def lose(http, moment, deployment, salt) -> dict:
    """What the clients of a moment get whose replica or front end is killed."""
    (before,) = pids(deployment)
    answers = asyncio.create_task(complete_all(http, moment, salt, may_fail=True))
    await reach(http, moment, salt, load_of)
    kill(deployment)
    start_s = time.monotonic()
    answers = await answers
    seconds = time.monotonic() - start_s
    load = await until_idle_again(http)
    return {
        "moment": moment,
        "answers": [_spell(answer) for answer in answers],
        "expected": await complete_all(http, moment, salt),
        "open": [load["num_requests"], load["kv_utilization"]],
        "is_replaced": pids(deployment) != [before],
        "seconds": seconds,
    }


def _spell(answer):
    return type(answer).__name__ if isinstance(answer, Exception) else answer


async def until_idle_again(http) -> dict:
    """The load, when the service answers and nothing is open any more."""
    async with asyncio.timeout(LIMIT_S):
        while True:
            try:
                health = await http.get("/health")
                load = await load_of(http)
                if health.status_code == 200 and not load["num_requests"]:
                    return load
            except (httpx.HTTPError, ray.exceptions.RayError):
                pass  # what was killed is not yet back
            await asyncio.sleep(0.1)


async def scenario(base_url: str) -> dict:
    async with httpx.AsyncClient(base_url=base_url, timeout=LIMIT_S) as http:
        return {
            deployment: [await lose(http, moment, deployment, salt) for moment in MOMENTS]
            for salt, deployment in enumerate((MODEL, FRONT_END_NAME))
        }


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    with local_ray(num_cpus=4):
        with started_serve() as base_url:
            deploy()
            outcomes = asyncio.run(scenario(base_url))
        check_nothing_is_left_behind()
        print(json.dumps(outcomes))  # noqa: T201


if __name__ == "__main__":
    main()
