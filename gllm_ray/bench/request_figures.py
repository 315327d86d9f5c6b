"""What a load comes to: throughput, latencies, goodput and errors."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, Self

from gllm_ray.bench.load_generator import Load, RequestRecord
from gllm_ray.simulation.metrics import Slo
from gllm_ray.simulation.quantile_sketch import QuantileSketch
from gllm_ray.simulation.report import Summary

_MAX_ERRORS = 5  # kinds that are told
_MAX_ERROR_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestFigures:
    """The figures of one load. Latencies are in seconds and of requests that got their output.

    Attributes:
        wall_s: From the start of the workload to the end of its last request.
        num_finished: Requests that got their output.
        num_failed: The others.
        errors: The commonest reasons of those, and how often each came.
        num_input_tokens: Prompt tokens of requests that finished.
        num_output_tokens: Their output tokens.
        num_messages: In how many messages those came.
        requests_per_s: Requests that finished, over the wall time.
        output_tokens_per_s: Their output tokens, over the wall time.
        max_lag_s: By how much a request was sent late at most; not much below the latencies, if
            the sending process was too busy to tell them.
        ttft_s: From when a request was to be sent to its first message.
        tpot_s: (E2E - TTFT) / (output tokens - 1), of requests with two tokens or more.
        itl_s: Between consecutive messages of a request.
        e2e_s: From when a request was to be sent to its last message.
        slo: What a good request is; None: nothing was asked.
        goodput_per_s: Requests that finished and met the SLO, over the wall time.
        goodput_ratio: Those requests as a share of all.
    """

    wall_s: float
    num_finished: int
    num_failed: int
    errors: dict[str, int]
    num_input_tokens: int
    num_output_tokens: int
    num_messages: int
    requests_per_s: float
    output_tokens_per_s: float
    max_lag_s: float
    ttft_s: Summary
    tpot_s: Summary
    itl_s: Summary
    e2e_s: Summary
    slo: Slo | None
    goodput_per_s: float
    goodput_ratio: float

    @classmethod
    def of(cls, load: Load, slo: Slo | None = None) -> Self:
        """Work out what clients saw of at least one request."""
        finished = [record for record in load.records if not record.error]
        failed = [record.error[:_MAX_ERROR_CHARS] for record in load.records if record.error]
        latencies = [_Latencies.of(record) for record in finished]
        num_output_tokens = sum(record.num_output_tokens for record in finished)
        num_good = sum(slo is None or slo.is_met(*each.for_slo) for each in latencies)
        return cls(
            wall_s=load.wall_s,
            num_finished=len(finished),
            num_failed=len(failed),
            errors=dict(Counter(failed).most_common(_MAX_ERRORS)),
            num_input_tokens=sum(record.num_prompt_tokens for record in finished),
            num_output_tokens=num_output_tokens,
            num_messages=sum(len(record.message_times_s) for record in finished),
            requests_per_s=len(finished) / load.wall_s,
            output_tokens_per_s=num_output_tokens / load.wall_s,
            max_lag_s=max(record.lag_s for record in load.records),
            ttft_s=summarize(each.ttft_s for each in latencies),
            tpot_s=summarize(each.tpot_s for each in latencies if each.tpot_s is not None),
            itl_s=summarize(gap_s for each in finished for gap_s in _gaps(each)),
            e2e_s=summarize(each.e2e_s for each in latencies),
            slo=slo,
            goodput_per_s=num_good / load.wall_s,
            goodput_ratio=num_good / len(load.records),
        )

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Latencies:
    """Of one request; `tpot_s` is None of a single token."""

    ttft_s: float
    tpot_s: float | None
    e2e_s: float

    @classmethod
    def of(cls, record: RequestRecord) -> Self:
        first_s, last_s = record.message_times_s[0], record.message_times_s[-1]
        num_gaps = record.num_output_tokens - 1
        tpot_s = (last_s - first_s) / num_gaps if num_gaps > 0 else None
        return cls(first_s - record.start_s, tpot_s, last_s - record.start_s)

    @property
    def for_slo(self) -> tuple[float, float | None, float]:
        return self.ttft_s, self.tpot_s, self.e2e_s


def _gaps(record: RequestRecord) -> Iterable[float]:
    return (after_s - before_s for before_s, after_s in pairwise(record.message_times_s))


def summarize(values: Iterable[float]) -> Summary:
    """Their mean and quantiles."""
    sketch = QuantileSketch()
    for value in values:
        sketch.add(value)
    return Summary.of(sketch)
