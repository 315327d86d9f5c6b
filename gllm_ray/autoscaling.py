"""How many replicas there should be, from what their engines tell.

Ray Serve and the simulator ask the same object.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil, inf
from statistics import fmean, median_low

from gllm_ray.autoscaling_config import ScalingRule
from gllm_ray.messages import EngineLoad


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaSignals:
    """What a replica tells of its engine; numbers that may be averaged.

    Attributes:
        num_waiting_tokens: Prompt tokens to compute that are not yet scheduled.
        arriving_tokens_per_s: Those that come a second.
        drain_tokens_per_s: Prompt tokens scheduled a second while others had to wait; 0: they never
            had to.
        prefill_capacity_tokens_per_s: The same of those that waited for nothing but their prefill.
        kv_utilization: Share of the KV blocks in use, 0 to 1.
    """

    num_waiting_tokens: float
    arriving_tokens_per_s: float
    drain_tokens_per_s: float
    prefill_capacity_tokens_per_s: float
    kv_utilization: float


class SignalMeter:
    """Makes signals of what the engine of one replica counts."""

    def __init__(self) -> None:
        self._read_s: float | None = None
        self._num_prompt_tokens = 0

    def read(self, load: EngineLoad, now_s: float) -> ReplicaSignals:
        """The signals; rates are those since the last call.

        Args:
            load: Of the engine now.
            now_s: Of any clock that does not go back.
        """
        elapsed_s = 0.0 if self._read_s is None else now_s - self._read_s
        # A scheduler that was replaced counts anew.
        num_tokens = max(0, load.num_prompt_tokens - self._num_prompt_tokens)
        self._read_s, self._num_prompt_tokens = now_s, load.num_prompt_tokens
        # New prompts will be found in the prefix cache as often as those before.
        computed_ratio = 1 - load.num_prefix_hit_tokens / (load.num_prefix_queried_tokens or 1)
        return ReplicaSignals(
            num_waiting_tokens=computed_ratio * load.num_waiting_tokens,
            arriving_tokens_per_s=computed_ratio * num_tokens / elapsed_s if elapsed_s > 0 else 0.0,
            drain_tokens_per_s=load.drain_tokens_per_s,
            prefill_capacity_tokens_per_s=load.prefill_capacity_tokens_per_s,
            kv_utilization=load.kv_utilization,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class DeploymentLoad:
    """What all replicas bear at one moment.

    Attributes:
        num_requests: Requests that all hold, and those held at the front.
        num_running: Replicas that take requests.
        num_replicas: Those, and those that start: how many are wanted so far.
        signals: Of the replicas that run and have told.
    """

    num_requests: float
    num_running: int
    num_replicas: int
    signals: Sequence[ReplicaSignals]


class Autoscaler:
    """Follows the load of a deployment from look to look.

    As many replicas are wanted as keep each at its target, by the signal that asks for most:
    requests, prompts that come, KV blocks. What waits at a replica cannot go to another, and who
    comes avoids it. So where the predicted queue time exceeds its target, the replicas there are
    stay, to stand in for the clogged ones, and where that is so at most of them, others start: in
    proportion to the queue time, but no more than `max_growth` times the running ones, because a
    queue grows while replicas start, though they will be enough for it.

    More start once more have been wanted for `upscale_delay_s` without a break, and as many as were
    wanted all that time; fewer likewise, after a `downscale_delay_s`. The first one starts at once.

    Source: the bounds within which the number may change are the stabilization windows of
        Kubernetes' HorizontalPodAutoscaler. Deviation: a window begins when a change is first
        wanted.

    Args:
        rule: Targets, delays, and limits.
    """

    def __init__(self, rule: ScalingRule) -> None:
        self._rule = rule
        self._since_s: float | None = None  # a change has been wanted
        self._is_up = False
        self._least_change = 0  # the number wanted in that time that is nearest to what there is

    def decide(self, load: DeploymentLoad, now_s: float) -> int:
        """Replicas from now on.

        Args:
            load: What they bear.
            now_s: Of any clock that does not go back.
        """
        rule, current = self._rule, load.num_replicas
        wanted = self._wanted(load)
        if wanted == current:
            self._since_s = None
            return current
        if current == 0:
            return max(1, rule.min_replicas)
        is_up = wanted > current
        if self._since_s is None or is_up != self._is_up:
            self._since_s, self._is_up, self._least_change = now_s, is_up, wanted
        nearest = min if is_up else max
        self._least_change = nearest(self._least_change, wanted)
        delay_s = rule.upscale_delay_s if is_up else rule.downscale_delay_s
        if now_s - self._since_s < delay_s:
            return current
        self._since_s = None
        # The last one goes alone, after a delay of its own.
        return self._least_change if current == 1 else max(1, self._least_change)

    def _wanted(self, load: DeploymentLoad) -> int:
        rule, signals = self._rule, load.signals
        by_requests = load.num_requests / rule.target_ongoing_requests
        by_kv = sum(each.kv_utilization for each in signals) / rule.target_kv_utilization
        wanted = ceil(max(by_requests, by_kv, self._wanted_for_prompts(load)))
        return min(max(wanted, rule.min_replicas), rule.max_replicas)

    def _wanted_for_prompts(self, load: DeploymentLoad) -> float:
        rule, signals = self._rule, load.signals
        capacity = _mean_told(each.prefill_capacity_tokens_per_s for each in signals)
        drain = _mean_told(each.drain_tokens_per_s for each in signals)
        arriving_tokens_per_s = sum(each.arriving_tokens_per_s for each in signals)
        for_new = arriving_tokens_per_s / (capacity * rule.target_prefill_utilization)
        queues = [each.num_waiting_tokens / drain / rule.target_queue_time_s for each in signals]
        if not queues:
            return for_new
        num_clogged = sum(queue > 1 for queue in queues)
        started = min(len(queues) * median_low(queues), rule.max_growth * load.num_running)
        return max(for_new, min(for_new + num_clogged, max(load.num_replicas, started)))


def _mean_told(rates: Iterable[float]) -> float:
    """The mean of those that are known; infinite if none is."""
    return fmean([rate for rate in rates if rate] or [inf])
