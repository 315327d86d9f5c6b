"""The demo service's pipeline on one host and across two; prints what came of it.

As a program it leaves traces in the directory that is given, and joins the cluster whose address
is given, or else starts two nodes on the loopback.
Nodes stand for hosts: each has a resource, `host_0` or `host_1`.
"""

import asyncio
import json
import sys
from contextlib import contextmanager
from pathlib import Path

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from gllm_ray.bench.stage_trace import write_stage_trace
from gllm_ray.bundles import bundles
from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.serve_file import load_only_service
from tests.faults.lost_node import node_of
from tests.faults.replicas import make_request, running

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
FIRST, SECOND = {"host_0": 0.01}, {"host_1": 0.01}
NUM_PROMPTS, NUM_PROMPT_TOKENS = 3, 400


def make_config(**pipeline):
    config = load_only_service(DEMO)
    scheduler = config.scheduler.model_copy(update={"policy": ChunkedPrefillConfig()})
    pipeline = config.pipeline.model_copy(update=pipeline)
    return config.model_copy(update={"scheduler": scheduler, "pipeline": pipeline})


def make_requests():
    """Prompts that a micro-batch takes whole, and their answers."""
    prompts = [
        tuple(5 + (7 * i + 13 * j) % 900 for j in range(NUM_PROMPT_TOKENS))
        for i in range(NUM_PROMPTS)
    ]
    return [
        make_request(f"request {i}", prompt=prompt, max_tokens=24)
        for i, prompt in enumerate(prompts)
    ]


async def serve(places, trace, **pipeline):
    """The tokens, the stages' nodes, and the file with the trace of the stages.

    Args:
        places: The resources that bring each stage to its host.
        trace: The file to write.
        pipeline: Settings.
    """
    config = make_config(**pipeline)
    owner, *stages = bundles(config)
    stages = [stage | place for stage, place in zip(stages, places, strict=True)]
    group = placement_group([owner | FIRST, *stages], strategy="PACK")
    try:
        async with running(config, group) as served:
            answers = [await served.collect(request) for request in make_requests()]
            actors = served.replica.group.stages
            await write_stage_trace(served.replica.group, trace)
            return {
                "tokens": [[event.token_id for event in events] for events in answers],
                "nodes": [await node_of(actor) for actor in actors],
                "trace": str(trace),
            }
    finally:
        remove_placement_group(group)


async def on_hosts(directory):
    """One pipeline at a time, so that a hop waits for nothing but the link."""
    return {
        "one": await serve([FIRST, FIRST], directory / "one.json"),
        "two": await serve([FIRST, SECOND], directory / "two.json"),
        "two, object store": await serve(
            [FIRST, SECOND],
            directory / "two_object_store.json",
            activation_transport="object_store",
        ),
        "two, direct": await serve(
            [FIRST, SECOND], directory / "two_direct.json", control_plane="direct"
        ),
    }


async def on_nodes(directory):
    """Side by side, for time."""
    one, two = await asyncio.gather(
        serve([FIRST, FIRST], directory / "one.json"),
        serve([FIRST, SECOND], directory / "two.json"),
    )
    return {"one": one, "two": two}


@contextmanager
def two_nodes():
    """Yields the address of a cluster of two raylets."""
    node = {"include_dashboard": False, "object_store_memory": 100 * 2**20}
    cluster = Cluster(
        initialize_head=True, head_node_args={**node, "num_cpus": 3, "resources": {"host_0": 1}}
    )
    try:
        cluster.add_node(num_cpus=1, resources={"host_1": 1}, object_store_memory=100 * 2**20)
        yield cluster.address
    finally:
        ray.shutdown()
        cluster.shutdown()


def main(directory, address=None):
    if address is not None:
        ray.init(address=address, log_to_driver=False)
        return asyncio.run(on_hosts(Path(directory)))
    with two_nodes() as address:
        ray.init(address=address, log_to_driver=False)
        return asyncio.run(on_nodes(Path(directory)))


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201
