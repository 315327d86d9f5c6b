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

from gllm_ray.demo.serve_process import free_port
from gllm_ray.serving.app import build_app
from tests.faults.moments import MOMENTS, SCHEDULER, complete_all, load_of, reach
from tests.faults.replicas import DEMO_MODEL
from tests.ray.test_ray_pipeline import stage_processes

NUM_STAGES = 2
AWAY_S = 2.0  # longer than any request of a moment takes
LIMIT_S = 60


def deploy():
    args = {
        "model": {"path": DEMO_MODEL, "served_name": "demo", "dtype": "float32"},
        "pipeline": {"device": "cpu", "num_stages": NUM_STAGES, "cpus_per_stage": 0.5},
        "kv_cache": {"kv_cache_bytes": "16MiB"},
        "scheduler": SCHEDULER,
        "recovery": {"heartbeat_s": 0.2, "calm_s": 0.01},
    }
    serve.run(build_app(args), name="demo", route_prefix="/")


async def without_gcs(head, http, moment, *, kill_stage=False) -> dict:
    """What the clients of a moment get while there is no GCS for some seconds."""
    before = stage_processes()
    expected = await complete_all(http, moment)
    answers = asyncio.create_task(complete_all(http, moment))
    await reach(http, moment)
    head.kill_gcs_server()
    start_s = time.monotonic()
    if kill_stage:
        os.kill(min(before), signal.SIGKILL)
    await asyncio.wait([answers], timeout=AWAY_S)
    num_served = len(MOMENTS[moment]) * answers.done()
    await asyncio.sleep(max(0.0, start_s + AWAY_S - time.monotonic()))
    head.start_gcs_server()
    answers = await answers
    load = await load_of(http)
    return {
        "moment": moment,
        "answers": answers,
        "expected": expected,
        "open": [load["num_requests"], load["kv_utilization"]],
        "num_served_without": num_served,
        "num_replaced": len(before - stage_processes()),
        "num_stages": len(stage_processes()),
        "seconds": time.monotonic() - start_s,
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
        outcomes.append(await without_gcs(head, http, "streaming", kill_stage=True))
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
    port = free_port()
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        deploy()
        outcomes = asyncio.run(scenario(cluster.head_node, f"http://127.0.0.1:{port}"))
        print(json.dumps(outcomes))  # noqa: T201
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
