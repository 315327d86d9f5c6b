"""A service whose GCS is killed and started again at each moment of a request's life.

Prints what came of it. A process of its own, because it needs a cluster of its own, with its state
in the Redis of the variable `RAY_REDIS_ADDRESS`.
"""

import asyncio
import json
import logging
import os
import signal
import sys
import time

import httpx
import ray
from ray import serve
from ray.cluster_utils import Cluster

from gllm_ray.serving.app import build_app
from tests.faults.moments import MOMENTS, complete_all, load_of, reach
from tests.faults.replicas import DEMO_MODEL, check_nothing_is_left_behind
from tests.local_ray import started_serve
from tests.ray.test_ray_pipeline import stage_processes

NUM_STAGES = 2
AWAY_S = 30  # at most; longer than any request takes, shorter than nodes wait for it to return
LIMIT_S = 60


def deploy():
    args = {
        "model": {"path": DEMO_MODEL, "served_name": "demo", "dtype": "float32"},
        "pipeline": {"device": "cpu", "num_stages": NUM_STAGES, "cpus_per_stage": 0.5},
        "kv_cache": {"kv_cache_bytes": "8MiB"},
        "recovery": {"heartbeat_s": 0.2, "calm_s": 0.01},
    }
    serve.run(build_app(args), name="demo", route_prefix="/")


async def without_gcs(head, http, moment, *, salt=0, kill_stage=False) -> dict:
    """What the clients of a moment get while there is no GCS for some seconds."""
    before = stage_processes()
    answers = asyncio.create_task(complete_all(http, moment, salt))
    await reach(http, moment, salt)
    head.kill_gcs_server()
    start_s = time.monotonic()
    if kill_stage:
        os.kill(min(before), signal.SIGKILL)
    await asyncio.wait([answers], timeout=3 if kill_stage else AWAY_S)
    is_served_without = answers.done()
    head.start_gcs_server()
    answers = await answers
    seconds = time.monotonic() - start_s
    load = await load_of(http)
    return {
        "moment": moment,
        "answers": answers,
        "expected": await complete_all(http, moment, salt),
        "open": [load["num_requests"], load["kv_utilization"]],
        "is_served_without": is_served_without,
        "num_replaced": len(before - stage_processes()),
        "num_stages": len(stage_processes()),
        "seconds": seconds,
    }


async def until_running():
    """Wait until the controller of Serve answers that the replica is healthy."""
    async with asyncio.timeout(LIMIT_S):
        while (await asyncio.to_thread(_status)) != "RUNNING":  # noqa: ASYNC110
            await asyncio.sleep(0.2)


def _status():
    return serve.status().applications["demo"].status


async def scenario(head, base_url: str) -> list[dict]:
    async with httpx.AsyncClient(base_url=base_url, timeout=LIMIT_S) as http:
        outcomes = []
        for moment in MOMENTS:
            outcomes.append(await without_gcs(head, http, moment))
            await until_running()
        outcomes.append(await without_gcs(head, http, "streaming", salt=1, kill_stage=True))
        await until_running()
        return outcomes


def main() -> None:
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 4,
            "include_dashboard": False,
            "object_store_memory": 100 * 2**20,
            "redis_password": sys.argv[1],
        },
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        with started_serve() as base_url:
            deploy()
            outcomes = asyncio.run(scenario(cluster.head_node, base_url))
        check_nothing_is_left_behind()
        print(json.dumps(outcomes))  # noqa: T201
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
