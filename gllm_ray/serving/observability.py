"""Where the log of a replica goes, and what it tells Prometheus."""

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncGenerator, Callable
from typing import NamedTuple, NoReturn, Protocol

from ray.serve.metrics import Counter, Gauge, Histogram

from gllm_ray.engine.completion import OutputCompleteError, passing_on
from gllm_ray.errors import GllmRayError, PipelineError
from gllm_ray.messages import EngineLoad, FinishReason, GenerationRequest, TokenEvent

METRIC_PREFIX = "gllm_ray_"  # Ray puts `ray_` before it
_REPORT_PERIOD_S = 5.0
_LATENCY_BOUNDS_S = tuple(0.01 * 2**i for i in range(16))  # to 328 s
_TPOT_BOUNDS_S = tuple(0.001 * 2**i for i in range(12))  # to 2 s


class MetricKind(NamedTuple):
    """A metric of each replica; its tags are `model_name` and those of Serve.

    Attributes:
        make: Its type.
        description: What it counts or measures.
        bounds_s: Between the buckets of a histogram.
        tags: Besides those of all.
    """

    make: Callable[..., Counter | Gauge | Histogram]
    description: str
    bounds_s: tuple[float, ...] = ()
    tags: tuple[str, ...] = ()


# The names are those of vLLM, `gllm_ray_` for `vllm:`, which Ray's metrics cannot spell.
METRICS = {
    "num_requests_running": MetricKind(Gauge, "Requests that hold KV blocks."),
    "num_requests_waiting": MetricKind(Gauge, "Requests that wait for KV blocks."),
    "num_microbatches_in_flight": MetricKind(Gauge, "Micro-batches in the pipeline."),
    "pipeline_repairing": MetricKind(Gauge, "1 while the pipeline is under repair, else 0."),
    "kv_cache_usage_perc": MetricKind(Gauge, "Share of the KV blocks in use, 0 to 1."),
    "num_preemptions_total": MetricKind(Counter, "Sequences that gave their KV blocks up."),
    "prefix_cache_queries_total": MetricKind(Counter, "Prompt tokens looked up."),
    "prefix_cache_hits_total": MetricKind(Counter, "Prompt tokens found, and not computed."),
    "prompt_tokens_total": MetricKind(Counter, "Prompt tokens of requests that got a token."),
    "generation_tokens_total": MetricKind(Counter, "Output tokens."),
    "request_success_total": MetricKind(
        Counter, "Requests that ended, by how: stop, length, ...", tags=("finished_reason",)
    ),
    "request_resumptions_total": MetricKind(
        Counter, "Replicas that took over a request of a lost one; told by front ends."
    ),
    "time_to_first_token_seconds": MetricKind(
        Histogram, "From arrival to the first token.", _LATENCY_BOUNDS_S
    ),
    "request_time_per_output_token_seconds": MetricKind(
        Histogram,
        "From the first token to the end, by the tokens after the first.",
        _TPOT_BOUNDS_S,
    ),
    "e2e_request_latency_seconds": MetricKind(
        Histogram, "From arrival to the end.", _LATENCY_BOUNDS_S
    ),
}


class ReportedPipeline(Protocol):
    """What is told of a pipeline, beside its requests."""

    @property
    def standstill_s(self) -> float:
        """How long it has been under repair; 0: it runs."""

    async def load(self) -> EngineLoad:
        """How much it holds."""


def log_with_serve() -> None:
    """Write this package's log where Serve writes the replica's."""
    own = logging.getLogger("gllm_ray")
    own.handlers = logging.getLogger("ray.serve").handlers
    own.setLevel(logging.INFO)
    own.propagate = False


class ServiceMetrics:
    """The metrics of this process, which Ray's agent on its node exports.

    Args:
        model_name: As clients name it.
    """

    def __init__(self, model_name: str) -> None:
        self._metrics = {}
        for name, kind in METRICS.items():
            options = {"boundaries": list(kind.bounds_s)} if kind.bounds_s else {}
            metric = kind.make(
                METRIC_PREFIX + name,
                kind.description,
                tag_keys=("model_name", *kind.tags),
                **options,
            )
            metric.set_default_tags({"model_name": model_name})
            self._metrics[name] = metric
        self._num_output_tokens = 0
        self._told: dict[str, int] = {}

    async def observe(
        self, request: GenerationRequest, events: AsyncGenerator[list[TokenEvent], None]
    ) -> AsyncGenerator[list[TokenEvent], None]:
        """Yield the events of a request, and measure it; closing this closes `events`.

        `OutputCompleteError`, thrown into it, ends the request as one that is complete.
        """
        start_s, first_s, num_tokens = time.monotonic(), None, 0
        reason = "abort"
        try:
            async with passing_on(events):
                async for step in events:
                    num_new = sum(event.token_id is not None for event in step)
                    if num_new and first_s is None:
                        first_s = time.monotonic()
                        self._observe("time_to_first_token_seconds", first_s - start_s)
                        self._count("prompt_tokens_total", len(request.prompt_token_ids))
                    num_tokens += num_new
                    self._num_output_tokens += num_new
                    reason = step[-1].finish_reason or reason
                    yield step
        except OutputCompleteError:
            reason = FinishReason.STOP
        except GllmRayError:
            reason = "error"
            raise
        finally:
            self._metrics["request_success_total"].inc(tags={"finished_reason": str(reason)})
            end_s = time.monotonic()
            self._observe("e2e_request_latency_seconds", end_s - start_s)
            if first_s is not None and num_tokens > 1:
                tpot_s = (end_s - first_s) / (num_tokens - 1)
                self._observe("request_time_per_output_token_seconds", tpot_s)

    async def report(self, pipeline: ReportedPipeline | None = None) -> NoReturn:
        """Tell for ever how many tokens there were, and how the pipeline is, if one is here."""
        while True:
            await asyncio.sleep(_REPORT_PERIOD_S)
            # For all requests at once: a call into Ray for each token would be dear.
            self._count_up_to("generation_tokens_total", self._num_output_tokens)
            if pipeline is not None:
                self._set("pipeline_repairing", float(pipeline.standstill_s > 0))
                with contextlib.suppress(PipelineError, TimeoutError):
                    async with asyncio.timeout(_REPORT_PERIOD_S):
                        self._report_load(await pipeline.load())

    def count_resumption(self) -> None:
        """A request goes on at another replica."""
        self._count("request_resumptions_total", 1)

    def _report_load(self, load: EngineLoad) -> None:
        num_waiting = load.num_waiting_requests
        self._set("num_requests_running", load.num_requests - num_waiting)
        self._set("num_requests_waiting", num_waiting)
        self._set("num_microbatches_in_flight", load.num_in_flight)
        self._set("kv_cache_usage_perc", load.kv_utilization)
        self._count_up_to("num_preemptions_total", load.num_preemptions)
        self._count_up_to("prefix_cache_queries_total", load.num_prefix_queried_tokens)
        self._count_up_to("prefix_cache_hits_total", load.num_prefix_hit_tokens)

    def _count_up_to(self, name: str, total: int) -> None:
        """Count what is new; the counts of a scheduler begin anew when it is replaced."""
        told = self._told.get(name, 0)
        self._count(name, total - told if total >= told else total)
        self._told[name] = total

    def _count(self, name: str, number: int) -> None:
        if number:  # Ray refuses 0
            self._metrics[name].inc(number)

    def _set(self, name: str, value: float) -> None:
        self._metrics[name].set(value)

    def _observe(self, name: str, value_s: float) -> None:
        self._metrics[name].observe(value_s)
