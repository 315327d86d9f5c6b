"""What `balanced` is meant to reach, what it does reach, and what bounds that."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import inf, prod
from typing import Any

from gllm_ray.bench.policy_scenarios import ONE_STAGE, OURS

Results = Mapping[str, Any]
# What leading means: least share of the best, and how near in throughput others count.
LEAST_THROUGHPUT, MOST_LATENCY, COMPARABLE = 0.99, 1.05, 0.97
LEAST_CAPACITY, LEAST_OFFLINE = 1.15, 1.03
LEAST_UTILIZATION, LEAST_IDEAL = 0.97, 0.95


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityGoal:
    """(a) The highest rate under the SLO, against the best setting of the same pipeline.

    Attributes:
        best: That setting.
        ratio: Ours to it.
        bound_ratio: Of the rate at which an ideal pipeline is all used up to its; no schedule has
            a higher one for long.
    """

    best: str
    ratio: float
    bound_ratio: float


@dataclass(frozen=True, slots=True, kw_only=True)
class FrontierGoal:
    """(b) One load: ratios to the best in each measure.

    Attributes:
        rate_per_s: The load.
        throughput: To the highest.
        ttft: p90, to the lowest of those with comparable throughput.
        tpot: p99, likewise, perhaps to another's.
        is_on_frontier: None of these is as good in both.
    """

    rate_per_s: float
    throughput: float
    ttft: float
    tpot: float
    is_on_frontier: bool

    @property
    def is_met(self) -> bool:
        """Whether ours is about the best in each measure."""
        return self.throughput >= LEAST_THROUGHPUT and max(self.ttft, self.tpot) <= MOST_LATENCY


@dataclass(frozen=True, slots=True, kw_only=True)
class OfflineGoal:
    """(c) and (d) The offline batch.

    Attributes:
        utilization: Of the stages.
        ideal_ratio: Share of the ideal, which has no bubble and the best tile.
        ideal_bound: The largest share that a schedule can reach.
        best: The fastest other setting of the same pipeline.
        ratio: Ours to it, in throughput.
        bound_ratio: The bound to it.
    """

    utilization: float
    ideal_ratio: float
    ideal_bound: float
    best: str
    ratio: float
    bound_ratio: float

    @property
    def is_saturated(self) -> bool:
        """Whether goal (c) is met."""
        return self.utilization >= LEAST_UTILIZATION and self.ideal_ratio >= LEAST_IDEAL


@dataclass(frozen=True, slots=True, kw_only=True)
class OneStageComparison:
    """The same devices tensor-parallel, at the better of their settings: ratios of ours to it."""

    capacity: float
    offline: float


def is_rival(name: str) -> bool:
    """Whether a setting is another one of the same pipeline."""
    return name != OURS and not name.startswith(ONE_STAGE)


def slo_capacities(scenario: Results) -> dict[str, float]:
    """The SLO capacity of each setting, requests a second.

    A pipeline's is at most what an ideal one keeps up with: a run ends before the queue of a higher
    rate, which grows for ever, has become too long.
    """
    bound = scenario["bounds"]["max_rate_per_s"]
    return {
        name: capacity if name.startswith(ONE_STAGE) else min(capacity, bound)
        for name, capacity in scenario["slo_capacity_per_s"].items()
    }


def capacity_goal(scenario: Results) -> CapacityGoal:
    """Goal (a) of one scenario."""
    capacities = slo_capacities(scenario)
    best = max(filter(is_rival, capacities), key=capacities.__getitem__)
    return CapacityGoal(
        best=best,
        ratio=_ratio(capacities[OURS], capacities[best]),
        bound_ratio=_ratio(scenario["bounds"]["max_rate_per_s"], capacities[best]),
    )


def fixed_goal(scenarios: Sequence[Results]) -> CapacityGoal:
    """Goal (a) over all scenarios, of geometric means: against the best single setting."""
    capacities = list(map(slo_capacities, scenarios))

    def mean(name: str) -> float:
        return geometric_mean([each[name] for each in capacities])

    best = max(filter(is_rival, capacities[0]), key=mean)
    bound = geometric_mean([each["bounds"]["max_rate_per_s"] for each in scenarios])
    return CapacityGoal(
        best=best,
        ratio=_ratio(mean(OURS), mean(best)),
        bound_ratio=_ratio(bound, mean(best)),
    )


def geometric_mean(values: Sequence[float]) -> float:
    """Of numbers that may be 0."""
    return float(prod(values) ** (1 / len(values)))


def frontier_goals(scenario: Results) -> list[FrontierGoal]:
    """Goal (b) at each rate."""
    rates = dict.fromkeys(run["rate_per_s"] for run in scenario["runs"])
    return [_frontier_goal(scenario, rate) for rate in rates if rate is not None]


def offline_goal(scenario: Results) -> OfflineGoal:
    """Goals (c) and (d)."""
    runs, bounds = runs_at(scenario, None), scenario["bounds"]
    ours = runs[OURS]
    best = max(filter(is_rival, runs), key=lambda name: runs[name]["tokens_per_s"])
    return OfflineGoal(
        utilization=ours["utilization"],
        ideal_ratio=ours["ideal_ratio"],
        ideal_bound=bounds["ideal_ratio"],
        best=best,
        ratio=ours["tokens_per_s"] / runs[best]["tokens_per_s"],
        bound_ratio=runs[best]["wall_s"] / bounds["offline_s"],
    )


def one_stage_comparison(scenario: Results) -> OneStageComparison:
    """Ours to the devices' tensor-parallel use."""
    capacities, runs = slo_capacities(scenario), runs_at(scenario, None)
    names = [name for name in capacities if name.startswith(ONE_STAGE)]
    return OneStageComparison(
        capacity=_ratio(capacities[OURS], max(capacities[name] for name in names)),
        offline=runs[OURS]["tokens_per_s"] / max(runs[name]["tokens_per_s"] for name in names),
    )


def runs_at(scenario: Results, rate_per_s: float | None) -> dict[str, Results]:
    """The runs of one rate by their setting."""
    return {run["policy"]: run for run in scenario["runs"] if run["rate_per_s"] == rate_per_s}


def _frontier_goal(scenario: Results, rate_per_s: float) -> FrontierGoal:
    runs = runs_at(scenario, rate_per_s)
    ours, others = runs[OURS], [run for name, run in runs.items() if is_rival(name)]
    tokens_per_s = ours["tokens_per_s"]
    ratios = [
        tuple(ours[measure] / run[measure] for measure in ("ttft_p90_s", "tpot_p99_s"))
        for run in others
        if run["tokens_per_s"] >= COMPARABLE * tokens_per_s
    ]
    ttft, tpot = map(max, zip(*ratios, strict=True)) if ratios else (0.0, 0.0)
    return FrontierGoal(
        rate_per_s=rate_per_s,
        throughput=tokens_per_s / max(run["tokens_per_s"] for run in others),
        ttft=ttft,
        tpot=tpot,
        is_on_frontier=all(min(pair) < 1 for pair in ratios),
    )


def _ratio(ours: float, other: float) -> float:
    return ours / other if other else inf
