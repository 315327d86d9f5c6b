"""The scoreboard: every policy on the same requests, in virtual time."""

from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from importlib.metadata import version
from platform import machine, python_version
from statistics import fmean
from typing import Any

from gllm_ray.bench.policy_bounds import max_rate_per_s, offline_bound
from gllm_ray.bench.policy_hardware import nominal_parts
from gllm_ray.bench.policy_reproduction import reproduce
from gllm_ray.bench.policy_runs import Effort, Measures, at_rate, mean_of, simulate, workload
from gllm_ray.bench.policy_scenarios import (
    TTFT_LIMIT_S,
    Scenario,
    contenders,
    slo_limits,
)
from gllm_ray.bench.slo_capacity import Search, keeps, slo_capacity
from gllm_ray.bench.source_commit import source_commit

Runs = dict[tuple[str, float | None, int], Measures]


def bench_policies(
    scenarios: Sequence[Scenario],
    effort: Effort,
    num_processes: int | None = None,
    on_result: Callable[[dict[str, Any]], None] = lambda _: None,
    *,
    with_reproduction: bool = True,
) -> dict[str, Any]:
    """Run every policy on every scenario, at every rate, offline and for its SLO capacity.

    Args:
        scenarios: What to run them on.
        effort: How much of it.
        num_processes: Simulations at a time; None: as many as there are processors.
        on_result: Called after each scenario with the results so far.
        with_reproduction: Whether to run published comparisons, too.

    Returns:
        The results with what they were obtained with, in JSON's types.
    """
    results: dict[str, Any] = {
        "gllm_ray": version("gllm_ray"),
        "commit": source_commit() or "",
        "python": python_version(),
        "simulated_on": machine(),
        "seeds": list(effort.seeds),
        "duration_s": effort.duration_s,
        "max_requests": effort.max_requests,
        "num_offline": effort.num_offline,
        "ttft_limit_s": TTFT_LIMIT_S,
        "scenarios": [],
        "reproduction": [],
    }
    with ProcessPoolExecutor(num_processes) as pool:
        for scenario in scenarios:
            results["scenarios"].append(_bench_scenario(scenario, effort, pool))
            on_result(results)
        if with_reproduction:
            results["reproduction"] = reproduce(effort, pool)
    return results


def _bench_scenario(scenario: Scenario, effort: Effort, pool: Executor) -> dict[str, Any]:
    limits, settings = slo_limits(scenario), contenders(scenario)
    cells = [(name, rate) for rate in (*scenario.rates_per_s, None) for name in settings]
    keys = [(name, rate, seed) for name, rate in cells for seed in effort.seeds]
    cases = (at_rate(settings[name], effort, seed, rate) for name, rate, seed in keys)
    runs: Runs = dict(zip(keys, pool.map(simulate, cases), strict=True))
    searches = [
        Search(
            contender=setting,
            effort=effort,
            seed=seed,
            limits=limits,
            start_per_s=scenario.rates_per_s[0],
            least_per_s=scenario.rates_per_s[0] / 2,
            known={rate: keeps(limits, runs[name, rate, seed]) for rate in scenario.rates_per_s},
        )
        for name, setting in settings.items()
        for seed in effort.seeds
    ]
    found = iter(pool.map(slo_capacity, searches))
    return {
        "name": scenario.name,
        "nominal": nominal_parts(scenario.hardware),
        "tpot_limit_s": limits["tpot_p99_s"],
        "runs": [
            {"policy": name, "rate_per_s": rate}
            | mean_of([runs[name, rate, seed] for seed in effort.seeds])
            for name, rate in cells
        ],
        "slo_capacity_per_s": {name: fmean(next(found) for _ in effort.seeds) for name in settings},
        "bounds": _bounds(scenario, effort),
    }


def _bounds(scenario: Scenario, effort: Effort) -> dict[str, float]:
    """What no schedule of the pipeline exceeds."""
    batches = [list(workload(scenario, None, effort.num_offline, seed)) for seed in effort.seeds]
    offline = [offline_bound(scenario.hardware, batch) for batch in batches]
    return {
        "max_rate_per_s": fmean(max_rate_per_s(scenario.hardware, batch) for batch in batches),
        "offline_s": fmean(bound.time_s for bound in offline),
        "ideal_ratio": fmean(bound.ideal_ratio for bound in offline),
    }
