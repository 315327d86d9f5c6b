"""Runs prompts through the real scheduler, engine and stages of one process."""

import asyncio
import itertools
from dataclasses import dataclass

import torch

from gllm_ray.config import ServiceConfig, parse_service_config
from gllm_ray.engine.engine import Engine
from gllm_ray.messages import GenerationRequest, MicroBatch, SamplingParams
from gllm_ray.policy_config import PolicyConfig, TokenThrottlingConfig
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.factories import make_scheduler

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


@dataclass(frozen=True)
class Run:
    """The tokens of each prompt, how the scheduler got there, and what it told of each prompt."""

    tokens: list[list[int]]
    batches: list[MicroBatch]
    num_preemptions: int
    num_prefix_hit_tokens: int
    prompt_logprobs: list[list[bytes]]


def run(
    pipeline: LocalPipeline, prompts: list[list[int]], max_tokens: int, **options: object
) -> Run:
    """Run the prompts side by side; see `run_rounds` for the options."""
    return run_rounds(pipeline, [prompts], max_tokens, **options)


def run_rounds(
    pipeline: LocalPipeline,
    rounds: list[list[list[int]]],
    max_tokens: int,
    *,
    block_size: int = 4,
    policy: PolicyConfig = WHOLE,
    num_blocks: int | None = None,
    ring: bool = False,
    sampling: SamplingParams = GREEDY,
    num_prompt_logprobs: int | None = None,
    prefix_caching: bool = True,
    aborted: frozenset[int] = frozenset(),
    silent: frozenset[int] = frozenset(),
) -> Run:
    """Run the prompts of each round side by side, after those of the round before have ended.

    The requests of the indices in `aborted` are aborted at their second token, those of the indices
    in `silent` ask for no log probabilities.
    """
    poison_kv_cache(pipeline)
    scheduler = make_scheduler(
        policy=policy,
        num_stages=len(pipeline.stages),
        num_blocks=num_blocks or pipeline.num_blocks,
        block_size=block_size,
        max_model_len=64,
        max_in_flight=len(pipeline.stages),
        ring=ring,
        max_decodes=8,
        prefix_caching=prefix_caching,
    )
    recorder = RecordingPipeline(pipeline)
    numbers = itertools.count()
    requests = [
        [
            GenerationRequest(
                request_id=str(number := next(numbers)),
                prompt_token_ids=tuple(prompt),
                max_tokens=max_tokens,
                sampling=sampling,
                num_prompt_logprobs=None if number in silent else num_prompt_logprobs,
            )
            for prompt in prompts
        ]
        for prompts in rounds
    ]
    tokens, told = asyncio.run(_collect(Engine(scheduler, recorder), requests, aborted))
    load = scheduler.load()
    return Run(tokens, recorder.batches, load.num_preemptions, load.num_prefix_hit_tokens, told)


async def _collect(
    engine: Engine, rounds: list[list[GenerationRequest]], aborted: frozenset[int]
) -> tuple[list[list[int]], list[list[bytes]]]:
    engine.start()
    tokens: dict[str, list[int]] = {}
    told: dict[str, list[bytes]] = {}
    for requests in rounds:
        for request in requests:
            tokens[request.request_id], told[request.request_id] = [], []
            await engine.add(request)
        num_open = len(requests)
        while num_open:
            for event in await engine.next_events():
                assert event.error is None, event.error
                num_open -= event.finish_reason is not None
                if event.prompt_logprobs is not None:
                    assert not tokens[event.request_id], "they come with the first token"
                    told[event.request_id].append(event.prompt_logprobs)
                if event.token_id is not None:
                    tokens[event.request_id].append(event.token_id)
                if int(event.request_id) in aborted and len(tokens[event.request_id]) == 2:
                    await engine.abort(event.request_id)
    await engine.close()
    return list(tokens.values()), list(told.values())
