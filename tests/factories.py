"""Requests, schedulers and batches for tests: no model, no network, no clock."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from gllm_ray.messages import GenerationRequest, MicroBatch, MicroBatchResult
from gllm_ray.model.prompt_logprobs import pack_prompt_logprobs
from gllm_ray.policy_config import PolicyConfig, TokenThrottlingConfig
from gllm_ray.scheduling import QueueLimits, Scheduler, SchedulerSettings, make_policy
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.length_predictor import HintPredictor, LengthPredictor
from gllm_ray.scheduling.load import CostModel


def make_scheduler(
    *,
    num_stages: int = 2,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int = 128,
    max_in_flight: int | None = None,
    crowding: float = 1.0,
    ring: bool = False,
    max_decodes: int = 512,
    policy: PolicyConfig | None = None,
    prefix_caching: bool = False,
    fair_share: bool = False,
    queue: QueueLimits | None = None,
    cost: CostModel | None = None,
    predictor: LengthPredictor | None = None,
) -> Scheduler:
    settings = SchedulerSettings(
        num_stages=num_stages,
        num_blocks=num_blocks,
        block_size=block_size,
        max_model_len=max_model_len,
        max_in_flight=max_in_flight or num_stages,
        crowding=crowding,
        ring=ring,
        max_decodes=max_decodes,
        prefix_caching=prefix_caching,
        fair_share=fair_share,
        queue=queue or QueueLimits(),
    )
    return Scheduler(
        make_policy(policy or TokenThrottlingConfig()),
        settings,
        cost=cost or LearntCostModel(),
        predictor=predictor or HintPredictor(),
    )


def make_request(
    request_id: str = "a",
    *,
    num_prompt_tokens: int = 8,
    max_tokens: int = 4,
    stop_token_ids: frozenset[int] = frozenset(),
    prompt: Sequence[int] | None = None,
    **options: Any,
) -> GenerationRequest:
    return GenerationRequest(
        request_id=request_id,
        prompt_token_ids=tuple(prompt or range(1, num_prompt_tokens + 1)),
        max_tokens=max_tokens,
        stop_token_ids=stop_token_ids,
        **options,
    )


def result_of(batch: MicroBatch) -> MicroBatchResult:
    """The result of a model whose next token is a hash of the sequence and the position."""
    return MicroBatchResult(
        batch_id=batch.batch_id,
        token_ids=tuple(
            100 + (7 * item.seq_id + item.end) % 50
            for item in batch.sequences
            if item.sampling is not None
        ),
        prompt_logprobs=prompt_logprobs_of(batch),
    )


def told_of(token_ids: Sequence[int], num_likely: int) -> bytes:
    """What a model tells of tokens that finds each likely by its number, and nothing else."""
    ids = np.array(token_ids, dtype=int)
    likely = np.repeat(ids[:, None], num_likely, axis=1)
    return pack_prompt_logprobs(-ids, ids, likely, -likely)


def prompt_logprobs_of(batch: MicroBatch) -> tuple[bytes, ...]:
    """What that model tells of the prompts in a micro-batch."""
    told = []
    for index, num_likely, following in batch.scored_chunks:
        targets = batch.sequences[index].token_ids[1:]
        targets += () if following is None else (following,)
        told.append(told_of(targets, num_likely))
    return tuple(told)
