"""How long the scheduler itself takes for a micro-batch: `schedule` and `commit`, nothing else."""

from collections import deque
from dataclasses import asdict, dataclass
from statistics import median, quantiles
from time import thread_time
from typing import Any

from gllm_ray.garbage import relax_garbage_collector
from gllm_ray.messages import GenerationRequest, MicroBatch, MicroBatchResult, StageTime
from gllm_ray.policy_config import PolicyConfig
from gllm_ray.scheduling import Scheduler, SchedulerSettings, make_policy
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.length_predictor import StatisticsPredictor

_BLOCK_SIZE = 16
_PROMPT_TOKENS = 250
_OUTPUT_TOKENS = 500
# What a running sequence holds, about: long outputs stay longer, and policies leave some free.
_HELD_TOKENS = 560
# A stage time in seconds, so that the cost model has something to learn.
_FLOOR_S, _TOKEN_S, _CONTEXT_TOKEN_S = 5e-3, 2e-5, 2e-8


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerBenchResult:
    """Processor times of one policy, in milliseconds for each micro-batch.

    Attributes:
        policy: Its name.
        num_steps: Micro-batches measured.
        num_running: Sequences that held blocks when the measurement ended.
        num_waiting: Requests that waited then.
        num_finished: Requests that ended during the measurement.
        median_ms: Median.
        p99_ms: 99th percentile.
        first_half_ms: Median of the first half of the steps.
        second_half_ms: That of the second half, after `num_finished / 2` more requests.
    """

    policy: str
    num_steps: int
    num_running: int
    num_waiting: int
    num_finished: int
    median_ms: float
    p99_ms: float
    first_half_ms: float
    second_half_ms: float

    @staticmethod
    def table_head() -> str:
        """The first two lines of a Markdown table."""
        return (
            "| policy | running | waiting | finished | median ms | p99 ms | by halves |\n"
            "|---|---|---|---|---|---|---|"
        )

    def table_row(self) -> str:
        """The line of this policy."""
        return (
            f"| {self.policy} | {self.num_running} | {self.num_waiting} | {self.num_finished} "
            f"| {self.median_ms:.2f} | {self.p99_ms:.2f} "
            f"| {self.first_half_ms:.2f}, {self.second_half_ms:.2f} |"
        )

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self)


def bench_scheduler(
    policy: PolicyConfig,
    *,
    num_stages: int = 16,
    num_running: int = 4096,
    num_waiting: int = 10_000,
    num_steps: int = 4000,
    ring: bool = False,
) -> SchedulerBenchResult:
    """Measure a policy under a load that stays as it is: who finishes is replaced.

    The KV cache has room for about `num_running` sequences, more or less by policy, and the others
    wait; lengths are spread by a fixed rule, and all prompts differ.
    """
    num_blocks = num_running * _HELD_TOKENS // _BLOCK_SIZE
    load = _warmed_up(policy, num_stages, num_running + num_waiting, num_blocks, ring=ring)
    num_finished = load.num_finished
    relax_garbage_collector()
    times_ms = [1000 * load.step() for _ in range(num_steps)]
    half = num_steps // 2
    return SchedulerBenchResult(
        policy=policy.name,
        num_steps=num_steps,
        num_running=load.num_running,
        num_waiting=load.scheduler.num_waiting_requests,
        num_finished=load.num_finished - num_finished,
        median_ms=median(times_ms),
        p99_ms=quantiles(times_ms, n=100)[-1],
        first_half_ms=median(times_ms[:half]),
        second_half_ms=median(times_ms[half:]),
    )


def _warmed_up(
    policy: PolicyConfig,
    num_stages: int,
    num_requests: int,
    num_blocks: int,
    *,
    ring: bool,
) -> "_SteadyLoad":
    load = _SteadyLoad(policy, num_stages, num_requests, num_blocks, ring=ring)
    while load.num_finished < num_requests // 2:
        load.step()
    return load


class _SteadyLoad:
    """A scheduler with as many micro-batches in flight as it allows."""

    def __init__(
        self,
        policy: PolicyConfig,
        num_stages: int,
        num_requests: int,
        num_blocks: int,
        *,
        ring: bool,
    ) -> None:
        self.num_finished = 0
        self._num_stages = num_stages
        self._num_added = 0
        self._now_s = 0.0
        self._in_flight: deque[MicroBatch] = deque()
        self.scheduler = Scheduler(
            make_policy(policy),
            SchedulerSettings(
                num_stages=num_stages,
                num_blocks=num_blocks,
                block_size=_BLOCK_SIZE,
                max_model_len=8192,
                max_decodes=num_requests,
                ring=ring,
            ),
            cost=LearntCostModel(),
            predictor=StatisticsPredictor(),
        )
        self._add(num_requests)

    @property
    def num_running(self) -> int:
        """Sequences that hold blocks."""
        return self.scheduler.num_requests - self.scheduler.num_waiting_requests

    def step(self) -> float:
        """Commit the oldest micro-batch, submit the next; returns the seconds both took."""
        start_s = thread_time()
        while (batch := self.scheduler.schedule(self._now_s)) is not None:
            self._in_flight.append(batch)
        elapsed_s = thread_time() - start_s
        result = self._result_of(self._in_flight.popleft())
        start_s = thread_time()
        events = self.scheduler.commit(result, self._now_s)
        elapsed_s += thread_time() - start_s
        num_finished = sum(event.finish_reason is not None for event in events)
        self.num_finished += num_finished
        self._add(num_finished)
        return elapsed_s

    def _result_of(self, batch: MicroBatch) -> MicroBatchResult:
        context = sum(item.end for item in batch.sequences if len(item.token_ids) == 1)
        time_s = _FLOOR_S + _TOKEN_S * batch.num_tokens + _CONTEXT_TOKEN_S * context
        self._now_s += time_s
        return MicroBatchResult(
            batch_id=batch.batch_id,
            token_ids=(7,) * sum(item.sampling is not None for item in batch.sequences),
            stage_times=tuple(
                StageTime(stage, batch.batch_id, time_s) for stage in range(self._num_stages)
            ),
        )

    def _add(self, num_requests: int) -> None:
        for index in range(self._num_added, self._num_added + num_requests):
            spread = (index * 7919) % 101 / 50  # 0 to 2, mean 1
            num_prompt_tokens = max(1, round(_PROMPT_TOKENS * spread))
            request = GenerationRequest(
                request_id=str(index),
                prompt_token_ids=tuple(range(index, index + num_prompt_tokens)),
                max_tokens=max(1, round(_OUTPUT_TOKENS * ((index * 104_729) % 101 / 50))),
            )
            self.scheduler.add(request, self._now_s)
        self._num_added += num_requests
