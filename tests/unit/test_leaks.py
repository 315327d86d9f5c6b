"""A thousand requests leave nothing behind: no KV block, no object, no memory."""

import asyncio
import gc
from collections import Counter

import psutil
import torch
from torch import nn

from gllm_ray.assembly.engines import build_engine
from gllm_ray.engine.client import EngineClient
from gllm_ray.messages import GenerationRequest, SamplingParams, StepInterval
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.pipelines import MAX_MODEL_LEN, make_service_config

NUM_WARM_UP = 200
NUM_REQUESTS = 1000
MAX_CONCURRENCY = 25
KV_CACHE_BYTES = 256 * 2**10  # so few blocks that the prefix cache is full after the warm-up
# A request that left one object behind would leave 800 of a kind.
MAX_OBJECT_GROWTH = 40
MODULES = ("gllm_ray", "asyncio", "_asyncio", "torch", "collections")
MAX_RSS_GROWTH_BYTES = 32 * 2**20


class Snapshot:
    """What the process holds: objects by type, tensor bytes, resident memory."""

    def __init__(self):
        gc.collect()
        objects = gc.get_objects()
        # Of other tests' modules a thread may import more meanwhile.
        kinds = (type(item) for item in objects)
        self.by_type = Counter(kind for kind in kinds if str(kind.__module__).startswith(MODULES))
        del self.by_type[StepInterval]  # the stages keep a window of the latest
        # Tensors of subclasses are those of other tests, and some have no size.
        self.tensor_bytes = sum(
            item.nbytes for item in objects if type(item) in (torch.Tensor, nn.Parameter)
        )
        self.rss_bytes = psutil.Process().memory_info().rss


def request(index):
    """Some greedy, some sampled; all prompts differ, half of them after a common prefix."""
    prefix = (1,) * 16 if index % 2 else ()
    return GenerationRequest(
        request_id=f"request-{index}",
        prompt_token_ids=(*prefix, index % 90 + 1, index // 90 + 1, 3),
        max_tokens=4,
        sampling=SamplingParams(temperature=float(index % 3 == 0), seed=index),
    )


async def serve(client, indices):
    indices = iter(indices)

    async def run():
        for index in indices:
            stream = client.generate(request(index))
            if index % 10 == 0:  # a client that leaves
                await anext(stream)
                await stream.aclose()
                continue
            events = [event async for step in stream for event in step]
            assert events[-1].finish_reason == "length"

    await asyncio.gather(*(run() for _ in range(MAX_CONCURRENCY)))


async def wait_until_idle(engine):
    async with asyncio.timeout(10):
        while engine.load().num_requests or engine.load().num_in_flight:  # noqa: ASYNC110
            await asyncio.sleep(0.01)


def test_after_a_thousand_requests_the_engine_holds_what_it_held_after_two_hundred(tiny_llama):
    config = make_service_config(tiny_llama, num_stages=2)
    kv_cache = config.kv_cache.model_copy(update={"kv_cache_bytes": KV_CACHE_BYTES})
    config = config.model_copy(update={"kv_cache": kv_cache})

    async def scenario():
        pipeline = LocalPipeline.start(config)
        engine = build_engine(
            config, pipeline, num_blocks=pipeline.num_blocks, max_model_len=MAX_MODEL_LEN
        )
        engine.start()
        client = EngineClient(engine)
        await client.start()
        await serve(client, range(NUM_WARM_UP))
        await wait_until_idle(engine)
        before = Snapshot()
        await serve(client, range(NUM_WARM_UP, NUM_REQUESTS))
        await wait_until_idle(engine)
        after = Snapshot()
        assert engine.load().kv_utilization == 0
        growth = after.by_type - before.by_type
        assert {kind: n for kind, n in growth.items() if n > MAX_OBJECT_GROWTH} == {}
        assert after.tensor_bytes <= before.tensor_bytes
        assert after.rss_bytes - before.rss_bytes < MAX_RSS_GROWTH_BYTES
        await client.close()
        await engine.close()

    asyncio.run(scenario())
