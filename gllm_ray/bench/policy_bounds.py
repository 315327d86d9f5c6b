"""What no schedule can exceed: the work at its best size, and what cannot be overlapped."""

from collections.abc import Iterable
from dataclasses import dataclass

from gllm_ray.bench.policy_hardware import Hardware, pipeline_cost, round_trip_s
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.ideal import IdealWork
from gllm_ray.simulation.simulated_request import SimulatedRequest

_ONE_ROW = StepLoad(num_decodes=1, num_context_tokens=1)


def ideal_work_s(hardware: Hardware, requests: Iterable[SimulatedRequest]) -> float:
    """Seconds of the slowest stage for requests, without a bubble and at the best tile.

    A prompt's tokens attend to those before them and no more; the token that a prompt yields is
    not decoded.
    """
    work = IdealWork(pipeline_cost(hardware))
    for request in requests:
        prompt, decodes = request.num_prompt_tokens, request.num_output_tokens - 1
        work.add(
            StepLoad(
                num_decodes=decodes,
                num_context_tokens=decodes * prompt + decodes * (decodes + 1) // 2,
                num_prefill_tokens=prompt,
                num_attention_pairs=prompt * (prompt + 1) // 2,
            )
        )
    return work.time_s


def max_rate_per_s(hardware: Hardware, requests: Iterable[SimulatedRequest]) -> float:
    """The highest rate at which even the ideal pipeline keeps up with such requests for long."""
    requests = list(requests)
    return len(requests) / ideal_work_s(hardware, requests)


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineBound:
    """The least time of a batch of requests that are all there from the start.

    Attributes:
        work_s: Of the slowest stage, without a bubble and at the best tile.
        fill_s: How long it waits for its first row, and the others compute after its last.
        longest_s: The request with most output, were it alone: each token takes a round trip.
    """

    work_s: float
    fill_s: float
    longest_s: float

    @property
    def time_s(self) -> float:
        """No schedule is faster."""
        return max(self.work_s + self.fill_s, self.longest_s)

    @property
    def ideal_ratio(self) -> float:
        """The largest share of the ideal, which has only the work, that a schedule can reach."""
        return self.work_s / self.time_s


def offline_bound(hardware: Hardware, requests: Iterable[SimulatedRequest]) -> OfflineBound:
    """What bounds the time of these requests."""
    requests, cost = list(requests), pipeline_cost(hardware)
    trip_s = round_trip_s(hardware, _ONE_ROW)
    slowest_s = max(cost.stage_time_s(stage, _ONE_ROW) for stage in range(hardware.num_stages))
    return OfflineBound(
        work_s=ideal_work_s(hardware, requests),
        fill_s=trip_s - slowest_s,
        longest_s=trip_s * max(request.num_output_tokens for request in requests),
    )
