"""The same requests on two stages of one host, then of two; prints what came of it."""

import asyncio
import json
import sys
from statistics import median

import ray
from ray.util.placement_group import placement_group, remove_placement_group

from gllm_ray.bundles import bundles
from tests.faults.lost_node import node_of
from tests.faults.replicas import make_config, make_request, running

FIRST, SECOND = {"host_0": 0.01}, {"host_1": 0.01}
NUM_PROMPTS, NUM_PROMPT_TOKENS = 3, 400


def make_requests():
    prompts = [
        tuple(5 + (7 * i + 13 * j) % 900 for j in range(NUM_PROMPT_TOKENS))
        for i in range(NUM_PROMPTS)
    ]
    return [
        make_request(f"request {i}", prompt=prompt, max_tokens=24)
        for i, prompt in enumerate(prompts)
    ]


async def serve(config, places):
    """The tokens, the stages' nodes, and how long hidden states travelled between them.

    Args:
        config: Of two stages.
        places: The resources that bring each stage to its host.
    """
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


async def main():
    config = make_config(2, scheduler={"policy": "chunked_prefill"})
    through_store = config.model_copy(
        update={
            "pipeline": config.pipeline.model_copy(update={"activation_transport": "object_store"})
        }
    )
    return {
        "one host": await serve(config, [FIRST, FIRST]),
        "two hosts": await serve(config, [FIRST, SECOND]),
        "two hosts, object store": await serve(through_store, [FIRST, SECOND]),
    }


if __name__ == "__main__":
    ray.init(address=sys.argv[1], log_to_driver=False)
    print(json.dumps(asyncio.run(main())))  # noqa: T201
