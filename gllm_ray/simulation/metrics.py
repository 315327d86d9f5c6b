"""What a simulation records as it runs, in memory that does not grow with its length."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import NamedTuple

from gllm_ray.messages import FinishReason
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.quantile_sketch import QuantileSketch

# How requests end that got all of their output.
FINISHED = (FinishReason.STOP, FinishReason.LENGTH)


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Limits that a good request keeps; None: no limit.

    Attributes:
        ttft_s: Time to the first token.
        tpot_s: Time per output token after the first.
        e2e_s: Time to the last token.
    """

    ttft_s: float | None = None
    tpot_s: float | None = None
    e2e_s: float | None = None

    def is_met(self, ttft_s: float, tpot_s: float | None, e2e_s: float) -> bool:
        """Whether a request kept the limits; a request of one token has no TPOT to exceed."""
        return (
            (self.ttft_s is None or ttft_s <= self.ttft_s)
            and (self.tpot_s is None or tpot_s is None or tpot_s <= self.tpot_s)
            and (self.e2e_s is None or e2e_s <= self.e2e_s)
        )


@dataclass(slots=True, kw_only=True)
class RequestProgress:
    """How far one request has come. Whoever runs it sets what `RequestMetrics` does not.

    Attributes:
        arrival_s: When it came.
        num_prompt_tokens: Length of its prompt.
        first_scheduled_s: When its first chunk was scheduled.
        first_token_s: When its first output token came; set by `RequestMetrics`.
        last_token_s: When its latest came; set by `RequestMetrics`.
        num_output_tokens: Output tokens so far; counted by `RequestMetrics`.
        num_preemptions: How often it was preempted, or lost its KV with a stage.
        cost_tokens: What the router takes it for.
    """

    arrival_s: float
    num_prompt_tokens: int
    first_scheduled_s: float | None = None
    first_token_s: float | None = None
    last_token_s: float = 0.0
    num_output_tokens: int = 0
    num_preemptions: int = 0
    cost_tokens: float = 0.0


class RequestMetrics:
    """Latencies and counts over all requests, those of all replicas.

    Latencies of a request count when it finishes, so not those of one that ends by an abort, by
    an error or because it expired; ITLs and preemptions count as they happen.

    Args:
        slo: What a good request is; the empty one: every request that finishes.

    Attributes:
        ttft_s: From arrival to the first token.
        tpot_s: (E2E - TTFT) / (output tokens - 1), of requests with two tokens or more.
        itl_s: Between consecutive tokens of a request; the first token has none.
        e2e_s: From arrival to the last token.
        queue_s: From arrival to the first chunk scheduled.
        num_ended: Requests by how they ended.
        num_good: Requests that finished and met the SLO.
        num_input_tokens: Prompt tokens of requests that finished.
        num_output_tokens: Output tokens of requests that finished.
        num_preemptions: Preemptions of requests that ended.
        admitted_s: When the last first chunk of a request that finished was scheduled.
        first_error: Why the first request was refused that the scheduler cannot serve; empty: none.
    """

    def __init__(self, slo: Slo | None = None) -> None:
        self.slo = slo
        self.ttft_s = QuantileSketch()
        self.tpot_s = QuantileSketch()
        self.itl_s = QuantileSketch()
        self.e2e_s = QuantileSketch()
        self.queue_s = QuantileSketch()
        self.num_ended = dict.fromkeys(FinishReason, 0)
        self.num_good = 0
        self.num_input_tokens = 0
        self.num_output_tokens = 0
        self.num_preemptions = 0
        self.admitted_s = 0.0
        self.first_error = ""

    def on_tokens(self, requests: Iterable[RequestProgress], now_s: float) -> None:
        """An output token of each of these requests has come, all at once."""
        # Most requests of a micro-batch got their last token together: few ITLs, of high counts.
        num_waited: dict[float, int] = {}
        for request in requests:
            if request.first_token_s is None:
                request.first_token_s = now_s
            else:
                last_token_s = request.last_token_s
                num_waited[last_token_s] = num_waited.get(last_token_s, 0) + 1
            request.last_token_s = now_s
            request.num_output_tokens += 1
        for last_token_s, count in num_waited.items():
            self.itl_s.add(now_s - last_token_s, count)

    def on_end(self, request: RequestProgress, reason: FinishReason) -> None:
        """A request has ended, after its last token.

        Raises:
            ValueError: It finished, but was never scheduled or has no token.
        """
        self.num_ended[reason] += 1
        self.num_preemptions += request.num_preemptions
        if reason not in FINISHED:
            return
        if request.first_scheduled_s is None or request.first_token_s is None:
            raise ValueError(f"{request}: must be scheduled and have a token before it finishes")
        self.admitted_s = max(self.admitted_s, request.first_scheduled_s)
        ttft_s = request.first_token_s - request.arrival_s
        e2e_s = request.last_token_s - request.arrival_s
        tpot_s = None
        if request.num_output_tokens > 1:
            tpot_s = (e2e_s - ttft_s) / (request.num_output_tokens - 1)
            self.tpot_s.add(tpot_s)
        self.ttft_s.add(ttft_s)
        self.e2e_s.add(e2e_s)
        self.queue_s.add(request.first_scheduled_s - request.arrival_s)
        self.num_input_tokens += request.num_prompt_tokens
        self.num_output_tokens += request.num_output_tokens
        self.num_good += self.slo is None or self.slo.is_met(ttft_s, tpot_s, e2e_s)


class BatchMetrics:
    """Sizes of micro-batches, those of all replicas.

    Attributes:
        num_tokens: Tokens of each micro-batch.
        num_decodes: Decodes of each micro-batch.
    """

    def __init__(self) -> None:
        self.num_tokens = QuantileSketch()
        self.num_decodes = QuantileSketch()

    def add(self, load: StepLoad) -> None:
        """A micro-batch was submitted."""
        self.num_tokens.add(load.num_tokens)
        self.num_decodes.add(load.num_decodes)


class IdleCause(StrEnum):
    """Why a stage computes nothing."""

    NO_WORK = "no_work"  # nothing that could be scheduled, and nothing on its way
    UPSTREAM = "upstream"  # the next micro-batch is in an earlier stage or on a link
    SCHEDULER = "scheduler"  # work could be scheduled, but is not yet
    REPAIR = "repair"  # requests wait for a stage that is being replaced


@dataclass(slots=True)
class StageTimeUse:
    """How one stage spends its time.

    Attributes:
        busy_s: Seconds in which it computed.
        idle_s: Seconds in which it did not, by cause.
    """

    busy_s: float = 0.0
    idle_s: dict[IdleCause, float] = field(default_factory=lambda: dict.fromkeys(IdleCause, 0.0))

    @property
    def total_s(self) -> float:
        """Seconds told of."""
        return self.busy_s + sum(self.idle_s.values())

    def add(self, other: "StageTimeUse") -> None:
        """Count the time of another stage too."""
        self.busy_s += other.busy_s
        for cause, idle_s in other.idle_s.items():
            self.idle_s[cause] += idle_s


class TimeWeightedMean:
    """The mean and the peak of a value that holds until it changes.

    Args:
        start_s: When it begins, at 0.
    """

    def __init__(self, start_s: float = 0.0) -> None:
        self.peak = 0.0
        self._start_s = self._now_s = start_s
        self._value = 0.0
        self._integral = 0.0

    def set(self, value: float, now_s: float) -> None:
        """The value changes, or is the same and time has passed.

        Raises:
            ValueError: Time runs backwards.
        """
        if now_s < self._now_s:
            raise ValueError(f"now_s={now_s}: must be >= {self._now_s}, the time before")
        self._integral += self._value * (now_s - self._now_s)
        self._now_s = now_s
        self._value = value
        self.peak = max(self.peak, value)

    def add(self, other: "TimeWeightedMean") -> None:
        """Count the time of another too, as if it had come before."""
        self.peak = max(self.peak, other.peak)
        self._integral += other.integral
        self._start_s -= other.duration_s

    @property
    def integral(self) -> float:
        """The value times the seconds it held, up to the last `set`."""
        return self._integral

    @property
    def duration_s(self) -> float:
        """Seconds up to the last `set`."""
        return self._now_s - self._start_s


class PipelineMetrics:
    """What the stages of a replica do, or those of several at the same place.

    Args:
        num_stages: Depth of the pipeline.
        start_s: When the replica starts.

    Attributes:
        stages: The time of each stage.
        kv_utilization: Share of the KV blocks in use, 0 to 1.
    """

    def __init__(self, num_stages: int, start_s: float = 0.0) -> None:
        self.stages = [StageTimeUse() for _ in range(num_stages)]
        self.kv_utilization = TimeWeightedMean(start_s)

    def add(self, other: "PipelineMetrics") -> None:
        """Count another replica too, of the same depth."""
        for stage, use in zip(self.stages, other.stages, strict=True):
            stage.add(use)
        self.kv_utilization.add(other.kv_utilization)


class StageInterval(NamedTuple):
    """When a stage computed a micro-batch, for a Gantt chart or a trace viewer.

    Attributes:
        stage_id: The stage.
        batch_id: The micro-batch.
        start_s: Seconds of the simulation.
        end_s: Seconds of the simulation.
        label: What to write on it.
        replica_id: Whose stage it is.
    """

    stage_id: int
    batch_id: int
    start_s: float
    end_s: float
    label: str = ""
    replica_id: int = 0
