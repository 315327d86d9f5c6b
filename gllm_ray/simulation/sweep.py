"""The same requests at several rates: throughput against latency."""

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.simulation_config import SimulationConfig
from gllm_ray.simulation.workload_config import (
    GammaArrivalsConfig,
    PoissonArrivalsConfig,
    SyntheticWorkloadConfig,
)

_HEADS = (
    "requests/s",
    "finished/s",
    "output tokens/s",
    "p50 TTFT",
    "p99 TTFT",
    "p50 TPOT",
    "p99 TPOT",
    "utilization",
    "goodput",
)
TABLE_HEAD = "  ".join(_HEADS)


def at_rate(config: SimulationConfig, rate_per_s: float) -> SimulationConfig:
    """The same requests, at another rate.

    Raises:
        ConfigError: Arrivals are neither Poisson nor gamma, or too many requests come.
    """
    workload = config.workload
    if not isinstance(workload.arrivals, PoissonArrivalsConfig | GammaArrivalsConfig):
        raise ConfigError(
            f"workload.arrivals={workload.arrivals.name}: must be poisson or gamma for a sweep; "
            "give a rate, such as `arrivals: 2`, or name: gamma"
        )
    arrivals = workload.arrivals.model_copy(update={"rate_per_s": rate_per_s})
    workload = workload.model_copy(update={"arrivals": arrivals, "rate_scale": 1.0})
    if isinstance(workload, SyntheticWorkloadConfig):
        try:
            workload.check_number()
        except ValueError as error:
            raise ConfigError(f"at {rate_per_s:g} requests/s: workload.{error}") from None
    return config.model_copy(update={"workload": workload})


def table_row(rate_per_s: float, report: Report) -> str:
    """The line of one rate, below `TABLE_HEAD`."""
    ttft, tpot = report.ttft_s, report.tpot_s
    cells = [
        f"{rate_per_s:g}",
        f"{report.requests_per_s:.3f}",
        f"{report.output_tokens_per_s:.1f}",
        *(f"{1000 * time_s:.0f} ms" for time_s in (ttft.p50, ttft.p99, tpot.p50, tpot.p99)),
        f"{report.pipeline.utilization:.0%}",
        "" if report.slo is None else f"{report.goodput_ratio:.0%}",
    ]
    padded = (cell.rjust(len(head)) for cell, head in zip(cells, _HEADS, strict=True))
    return "  ".join(padded).rstrip()
