"""What a workload asks of a deployment, and how much of that a deployment serves."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.workload_config import SyntheticWorkloadConfig, TraceWorkloadConfig

# By how much of the time in which requests come the last first chunk may be later.
_TOLERANCE = 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """The output that all requests of a workload ask for.

    Attributes:
        num_output_tokens: Output tokens of all requests.
        span_s: Seconds in which they come; 0: all at once.
    """

    num_output_tokens: int
    span_s: float

    @classmethod
    def of(
        cls,
        requests: Iterable[SimulatedRequest],
        config: SyntheticWorkloadConfig | TraceWorkloadConfig,
    ) -> Self:
        """What the requests of a workload ask for."""
        num_requests, num_output_tokens, span_s = 0, 0, 0.0
        for request in requests:
            num_requests += 1
            num_output_tokens += min(
                request.num_output_tokens, request.max_tokens or request.num_output_tokens
            )
            span_s = request.arrival_s
        # Drawn requests come without end, so the time in which none does is part of the demand.
        is_drawn = isinstance(config, SyntheticWorkloadConfig)
        if is_drawn and config.duration_s is not None and num_requests != config.num_requests:
            span_s = config.duration_s
        return cls(num_output_tokens=num_output_tokens, span_s=span_s)

    def served_per_s(self, admitted_s: float, wall_s: float) -> float:
        """Output tokens per second that a deployment serves, the final drain left out.

        Those that keep up serve the same, whoever drains faster. One that does not is behind by
        the time for which the last request has waited.

        Args:
            admitted_s: When the first chunk of the last request was scheduled.
            wall_s: When the last request ended, which counts for a batch that comes at once.
        """
        if not self.span_s:
            return self.num_output_tokens / wall_s
        keeps_up = admitted_s <= (1 + _TOLERANCE) * self.span_s
        return self.num_output_tokens / (self.span_s if keeps_up else admitted_s)
