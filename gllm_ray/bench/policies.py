"""The scoreboard: every policy on the same requests, in virtual time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from dataclasses import dataclass, replace
from importlib.metadata import version
from itertools import islice, product
from math import sqrt
from pathlib import Path
from platform import machine, python_version
from statistics import fmean
from subprocess import CalledProcessError
from subprocess import run as run_command
from typing import Any

from gllm_ray.bench.policy_scenarios import (
    SCENARIOS,
    Scenario,
    candidates,
    deployment,
    tpot_limit_s,
)
from gllm_ray.policy_config import (
    ChunkedPrefillConfig,
    PolicyConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import SyntheticWorkloadConfig

OURS = "balanced"
TTFT_LIMIT_S = 2.0
_MEASURES: dict[str, Callable[[Report], float]] = {
    "tokens_per_s": lambda report: report.input_tokens_per_s + report.output_tokens_per_s,
    "ttft_p90_s": lambda report: report.ttft_s.p90,
    "tpot_p99_s": lambda report: report.tpot_s.p99,
    "e2e_mean_s": lambda report: report.e2e_s.mean,
    "utilization": lambda report: report.pipeline.utilization,
    "ideal_ratio": lambda report: report.ideal_ratio or 0.0,
    "num_preemptions": lambda report: report.num_preemptions,
}
Measures = dict[str, float]
_Side = tuple[Scenario, PolicyConfig, float | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is simulated.

    Attributes:
        duration_s: Seconds in which requests come at each rate.
        num_offline: Requests of an offline batch.
        seeds: One run each; measures are their means.
        num_bisections: Of the range in which an SLO capacity is searched.
    """

    duration_s: float = 128.0
    num_offline: int = 5000
    seeds: tuple[int, ...] = (0, 1, 2)
    num_bisections: int = 7


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation.

    Attributes:
        scenario: The hardware and what requests are like.
        policy: What is compared.
        rate_per_s: Requests a second; None: all at once.
        num_requests: How many come.
        seed: Of the requests.
    """

    scenario: Scenario
    policy: PolicyConfig
    rate_per_s: float | None
    num_requests: int
    seed: int


def simulate(case: Case) -> Measures:
    """What came of one case."""
    arrivals = "at_once" if case.rate_per_s is None else case.rate_per_s
    workload = Workload(
        SyntheticWorkloadConfig.model_validate(
            {
                "arrivals": arrivals,
                "lengths": case.scenario.lengths,
                "num_requests": case.num_requests,
            }
        ),
        case.seed,
    )
    pipeline = deployment(case.scenario, case.policy)
    report = Simulation(pipeline, workload, seed=case.seed).run().report
    return {name: measure(report) for name, measure in _MEASURES.items()}


def at_rate(
    scenario: Scenario, policy: PolicyConfig, effort: Effort, seed: int, rate_per_s: float | None
) -> Case:
    """The case of one rate, of as many requests as come in the time; None: the offline batch."""
    num_requests = effort.num_offline
    if rate_per_s is not None:
        num_requests = max(1, round(rate_per_s * effort.duration_s))
    return Case(
        scenario=scenario,
        policy=policy,
        rate_per_s=rate_per_s,
        num_requests=num_requests,
        seed=seed,
    )


def slo_capacity(scenario: Scenario, policy: PolicyConfig, effort: Effort, seed: int) -> float:
    """The highest rate at which p90 TTFT and p99 TPOT keep their limits; 0 if none does.

    It is searched from half the lowest rate of the scenario to twice the highest, 7 bisections of
    which leave 2 to 3 %.
    """
    limit_s = tpot_limit_s(scenario.hardware)

    def is_met(rate_per_s: float) -> bool:
        measures = simulate(at_rate(scenario, policy, effort, seed, rate_per_s))
        return measures["ttft_p90_s"] <= TTFT_LIMIT_S and measures["tpot_p99_s"] <= limit_s

    low, high = scenario.rates_per_s[0] / 2, 2 * scenario.rates_per_s[-1]
    if not is_met(low):
        return 0.0
    for _ in range(effort.num_bisections):
        middle = sqrt(low * high)
        low, high = (middle, high) if is_met(middle) else (low, middle)
    return low


def bench_policies(
    scenarios: Sequence[Scenario] = SCENARIOS,
    effort: Effort = Effort(),
    num_processes: int | None = None,
    progress: Callable[[str], None] = lambda _: None,
) -> dict[str, Any]:
    """Run every policy on every scenario, at every rate, offline and for its SLO capacity.

    Args:
        scenarios: What to run them on.
        effort: How much of it.
        num_processes: Simulations at a time; None: as many as there are processors.
        progress: Told of each scenario that is done.

    Returns:
        The results with what they were obtained with, in JSON's types.
    """
    results = []
    with ProcessPoolExecutor(num_processes) as pool:
        for scenario in scenarios:
            results.append(_bench_scenario(scenario, effort, pool))
            progress(scenario.name)
        reproduction = _reproduce(effort, pool)
    return {
        "gllm_ray": version("gllm_ray"),
        "commit": _commit(),
        "python": python_version(),
        "simulated_on": machine(),
        "seeds": list(effort.seeds),
        "duration_s": effort.duration_s,
        "num_offline": effort.num_offline,
        "ttft_limit_s": TTFT_LIMIT_S,
        "scenarios": results,
        "reproduction": reproduction,
    }


def _bench_scenario(scenario: Scenario, effort: Effort, pool: Executor) -> dict[str, Any]:
    limit_s = tpot_limit_s(scenario.hardware)
    policies = candidates(limit_s)
    cells = [(name, rate) for rate in (*scenario.rates_per_s, None) for name in policies]
    measured = pool.map(
        simulate,
        (
            at_rate(scenario, policies[name], effort, seed, rate)
            for name, rate in cells
            for seed in effort.seeds
        ),
    )
    searches = product(policies.values(), effort.seeds)
    capacities = pool.map(
        slo_capacity,
        *zip(*((scenario, policy, effort, seed) for policy, seed in searches), strict=True),
    )
    num_seeds = len(effort.seeds)
    return {
        "name": scenario.name,
        "tpot_limit_s": limit_s,
        "runs": [
            {"policy": name, "rate_per_s": rate} | _mean(list(islice(measured, num_seeds)))
            for name, rate in cells
        ],
        "slo_capacity_per_s": {name: fmean(islice(capacities, num_seeds)) for name in policies},
    }


def _mean(group: Sequence[Measures]) -> Measures:
    return {name: fmean(measures[name] for measures in group) for name in _MEASURES}


def _reproduce(effort: Effort, pool: Executor) -> list[dict[str, Any]]:
    """What is published of pairs of policies, and the same pairs here."""
    sharegpt, azure = SCENARIOS[:2]
    starved = replace(azure, num_blocks=60_000 // 16)
    throttling, sarathi = TokenThrottlingConfig(), ChunkedPrefillConfig(token_budget=2048)
    pairs: list[tuple[str, str, _Side, _Side]] = [
        (
            "token throttling against Sarathi-2048, 8 req/s",
            "E2E 0.3-0.4 x, utilization 0.94 against 0.51",
            (sharegpt, throttling, 8.0),
            (sharegpt, sarathi, 8.0),
        ),
        (
            "throttling with its KV term against without, 2 req/s, 60k KV tokens",
            "1455 against 344 tokens/s, 0 against 3085 preemptions",
            (starved, throttling, 2.0),
            (starved, TokenThrottlingConfig(kv_term=False), 2.0),
        ),
        (
            "TD-Pipe against PP+HB (chunked prefill 512), offline",
            "up to 2.73 x the throughput of pipeline parallelism",
            (sharegpt, TemporalConfig(), None),
            (sharegpt, ChunkedPrefillConfig(), None),
        ),
    ]
    cases = [
        at_rate(scenario, policy, effort, seed, rate)
        for _, _, first, second in pairs
        for scenario, policy, rate in (first, second)
        for seed in effort.seeds
    ]
    measured, num_seeds = pool.map(simulate, cases), len(effort.seeds)
    return [
        {
            "what": what,
            "published": published,
            "first": _mean(list(islice(measured, num_seeds))),
            "second": _mean(list(islice(measured, num_seeds))),
        }
        for what, published, *_ in pairs
    ]


def _commit() -> str:
    """The commit of the source, with a mark if it was changed since; empty where it has none."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return run_command(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, CalledProcessError):
        return ""
