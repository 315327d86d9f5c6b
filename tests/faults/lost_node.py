"""A replica over two local nodes, one of which goes at each moment of a request's life.

Prints what came of it. A process of its own, because it needs a cluster of its own.
"""

import asyncio
import json
import logging
import sys
import time

import ray
from ray.cluster_utils import Cluster

from gllm_ray.bundles import bundles
from tests.faults.api import serving
from tests.faults.moments import MOMENTS, complete_all, reach
from tests.faults.replicas import check_nothing_is_left_behind, make_config

# The replica, its scheduler and the first stage stay where they are.
HEAD, OTHER = {"head": 0.01}, {"other": 0.01}


def add_other_node(cluster: Cluster):
    return cluster.add_node(num_cpus=1, resources={"other": 1})


async def lose_node(cluster, service, http, lost, moment) -> dict:
    """What the clients of a moment get, and where the stages were and are."""
    before = [await node_of(stage) for stage in service.replica.group.stages]
    answers = asyncio.create_task(complete_all(http, moment))
    await reach(http, moment)
    start_s = time.monotonic()
    cluster.remove_node(lost, allow_graceful=False)
    answers = await answers
    seconds = time.monotonic() - start_s
    load = await service.replica.load()
    return {
        "moment": moment,
        "answers": answers,
        "expected": await complete_all(http, moment),
        "open": [load.num_requests, load.kv_utilization],
        "lost": lost.node_id,
        "before": before,
        "after": [await node_of(stage) for stage in service.replica.group.stages],
        "seconds": seconds,
    }


async def scenario(cluster: Cluster, control_plane: str) -> list[dict]:
    config = make_config(2, control_plane=control_plane, heartbeat_timeout_s=3, calm_s=0.01)
    config = config.model_copy(
        update={"pipeline": config.pipeline.model_copy(update={"cpus_per_stage": 1.0})}
    )
    outcomes, other = [], add_other_node(cluster)
    head, first, last = bundles(config)
    async with serving(config, [head | HEAD, first | HEAD, last | OTHER]) as (service, http):
        for moment in MOMENTS:
            spare = add_other_node(cluster)
            outcomes.append(await lose_node(cluster, service, http, other, moment))
            check_nothing_is_left_behind()
            other = spare
    check_nothing_is_left_behind()
    return outcomes


async def node_of(stage) -> str:
    beside_steps = stage.__ray_call__.options(concurrency_group="ctl")
    return await beside_steps.remote(lambda _: ray.get_runtime_context().get_node_id())


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": False,
            "resources": {"head": 1},
            "object_store_memory": 100 * 2**20,
            # Else Ray takes ten seconds to see that a node is gone.
            "_system_config": {"health_check_period_ms": 500},
        },
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        print(json.dumps(asyncio.run(scenario(cluster, sys.argv[1]))))  # noqa: T201
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
