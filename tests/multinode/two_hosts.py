"""The demo service's pipeline on one host and across two; prints what came of it.

As a program it joins the cluster whose address is given, or else starts two nodes on the loopback.
Nodes stand for hosts: each has a resource, `host_0` or `host_1`.
"""

import asyncio
import json
import sys
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import ray
from ray.cluster_utils import Cluster
from ray.util.placement_group import placement_group, remove_placement_group

from gllm_ray.bundles import bundles
from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.serve_file import load_only_service
from tests.faults.lost_node import node_of
from tests.faults.replicas import make_request, running

DEMO = Path(__file__).parents[2] / "configs" / "demo.yaml"
FIRST, SECOND = {"host_0": 0.01}, {"host_1": 0.01}
NUM_PROMPTS, NUM_PROMPT_TOKENS = 3, 400


def make_config(transport):
    config = load_only_service(DEMO)
    scheduler = config.scheduler.model_copy(update={"policy": ChunkedPrefillConfig()})
    pipeline = config.pipeline.model_copy(update={"activation_transport": transport})
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


async def serve(transport, places):
    """The tokens, the stages' nodes, and how long hidden states travelled between them.

    Args:
        transport: Of hidden states.
        places: The resources that bring each stage to its host.
    """
    config = make_config(transport)
    owner, *stages = bundles(config)
    stages = [stage | place for stage, place in zip(stages, places, strict=True)]
    group = placement_group([owner | FIRST, *stages], strategy="PACK")
    try:
        async with running(config, group) as pipeline:
            answers = [await pipeline.collect(request) for request in make_requests()]
            actors = pipeline.replica.group.stages
            first, last = await asyncio.gather(*(actor.intervals.remote() for actor in actors))
            starts_s = {each.batch_id: each.start_s for each in last}
            hops_s = sorted(starts_s[each.batch_id] - each.end_s for each in first)
            return {
                "tokens": [[event.token_id for event in events] for events in answers],
                "nodes": [await node_of(actor) for actor in actors],
                "prompt_hop_s": median(hops_s[-NUM_PROMPTS:]),  # they have the most rows
                "decode_hop_s": median(hops_s[:-NUM_PROMPTS]),
            }
    finally:
        remove_placement_group(group)


async def on_hosts():
    """One pipeline at a time, so that a hop waits for nothing but the link."""
    return {
        "one": await serve("gloo", [FIRST, FIRST]),
        "two": await serve("gloo", [FIRST, SECOND]),
        "two, object store": await serve("object_store", [FIRST, SECOND]),
    }


async def on_nodes():
    """Side by side, for time."""
    one, two = await asyncio.gather(serve("gloo", [FIRST, FIRST]), serve("gloo", [FIRST, SECOND]))
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


def main(address=None):
    if address is not None:
        ray.init(address=address, log_to_driver=False)
        return asyncio.run(on_hosts())
    with two_nodes() as address:
        ray.init(address=address, log_to_driver=False)
        return asyncio.run(on_nodes())


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))  # noqa: T201
