"""A replica over three local nodes, one of which goes while requests run; prints what came of it.

A process of its own, because it needs a cluster of its own.
"""

import asyncio
import json
import logging
import sys

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group

from gllm_ray.bundles import bundles
from tests.faults.replicas import make_config, make_requests, running

# The replica, its scheduler and the first stage stay where they are.
HEAD, OTHER = {"head": 0.01}, {"other": 0.01}


async def scenario(cluster: Cluster) -> dict:
    config = make_config(2, heartbeat_timeout_s=3)
    config = config.model_copy(
        update={"pipeline": config.pipeline.model_copy(update={"cpus_per_stage": 1.0})}
    )
    lost = cluster.add_node(num_cpus=1, resources={"other": 1})
    head, first, last = bundles(config)
    group = placement_group([head | HEAD, first | HEAD, last | OTHER], strategy="PACK")
    async with running(config, group) as pipeline:
        nodes = [await node_of(stage) for stage in pipeline.replica.group.stages]
        expected = await pipeline.collect_all(make_requests())
        cluster.add_node(num_cpus=1, resources={"other": 1})
        decoding = asyncio.Event()
        streams = [
            asyncio.create_task(pipeline.collect(r, lambda n: n >= 5 and decoding.set()))
            for r in make_requests()
        ]
        await decoding.wait()
        cluster.remove_node(lost, allow_graceful=False)
        answers = await asyncio.gather(*streams)
        return {
            "answers": answers,
            "expected": expected,
            "lost": lost.node_id,
            "before": nodes,
            "after": [await node_of(stage) for stage in pipeline.replica.group.stages],
        }


async def node_of(stage) -> str:
    return await stage.__ray_call__.remote(lambda _: ray.get_runtime_context().get_node_id())


def main() -> None:
    logging.basicConfig(level=logging.INFO, stream=sys.stderr)
    cluster = Cluster(
        initialize_head=True,
        head_node_args={
            "num_cpus": 2,
            "include_dashboard": False,
            "resources": {"head": 1},
            "object_store_memory": 100 * 2**20,
        },
    )
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        print(json.dumps(asyncio.run(scenario(cluster))))  # noqa: T201
    finally:
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
