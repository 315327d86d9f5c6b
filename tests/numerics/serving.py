"""Runs prompts through the real scheduler, engine and stages of one process."""

import asyncio

import torch

from gllm_ray.config import ServiceConfig, parse_service_config
from gllm_ray.engine.engine import Engine
from gllm_ray.messages import GenerationRequest, MicroBatch, SamplingParams
from gllm_ray.policy_config import PolicyConfig, TokenThrottlingConfig
from gllm_ray.scheduling import Scheduler, make_policy
from gllm_ray.stages.local_pipeline import LocalPipeline

GREEDY = SamplingParams()
WHOLE = TokenThrottlingConfig(max_prefill_tokens=512, min_prefill_tokens=512)


def chunks_of(num_tokens: int) -> TokenThrottlingConfig:
    return TokenThrottlingConfig(
        max_prefill_tokens=num_tokens, min_prefill_tokens=num_tokens, kv_threshold=0.0
    )


def service_config(path, *, num_stages=1, block_size=4, layers="auto", **model) -> ServiceConfig:
    return parse_service_config(
        {
            "model": {"path": str(path), "max_model_len": 64, **model},
            "pipeline": {"device": "cpu", "num_stages": num_stages, "layers": layers},
            "kv_cache": {"block_size": block_size, "kv_cache_bytes": "1MiB"},
        }
    )


def poison_kv_cache(pipeline: LocalPipeline) -> None:
    """Fill the KV cache with NaN, so that reading an unwritten slot shows."""
    for worker in pipeline._workers:
        for cache in worker._caches.values():
            cache.keys.fill_(torch.nan)
            cache.values.fill_(torch.nan)


class RecordingPipeline:
    """Passes every call on to the real pipeline and keeps the batches it saw."""

    def __init__(self, pipeline: LocalPipeline) -> None:
        self._pipeline = pipeline
        self.batches: list[MicroBatch] = []

    def submit(self, batch):
        self.batches.append(batch)
        self._pipeline.submit(batch)

    async def next_result(self):
        return await self._pipeline.next_result()

    async def close(self):
        pass


class Run:
    """The tokens of each prompt, and how the scheduler got there."""

    def __init__(self, tokens, batches, num_preemptions):
        self.tokens: list[list[int]] = tokens
        self.batches: list[MicroBatch] = batches
        self.num_preemptions: int = num_preemptions


def run(
    pipeline: LocalPipeline,
    prompts: list[list[int]],
    max_tokens: int,
    *,
    block_size: int = 4,
    policy: PolicyConfig = WHOLE,
    num_blocks: int | None = None,
    sampling: SamplingParams = GREEDY,
) -> Run:
    poison_kv_cache(pipeline)
    scheduler = Scheduler(
        make_policy(policy),
        num_stages=len(pipeline.stages),
        num_blocks=num_blocks or pipeline.num_blocks,
        block_size=block_size,
        max_model_len=64,
        max_in_flight=len(pipeline.stages),
        max_decodes=8,
    )
    recorder = RecordingPipeline(pipeline)
    requests = [
        GenerationRequest(
            request_id=str(index),
            prompt_token_ids=tuple(prompt),
            max_tokens=max_tokens,
            sampling=sampling,
        )
        for index, prompt in enumerate(prompts)
    ]
    tokens = asyncio.run(_collect(Engine(scheduler, recorder), requests))
    return Run(tokens, recorder.batches, scheduler.num_preemptions)


async def _collect(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    engine.start()
    for request in requests:
        await engine.add(request)
    tokens = {request.request_id: [] for request in requests}
    num_open = len(requests)
    while num_open:
        for event in await engine.next_events():
            assert event.error is None, event.error
            tokens[event.request_id].append(event.token_id)
            num_open -= event.finish_reason is not None
    await engine.close()
    return [tokens[request.request_id] for request in requests]
