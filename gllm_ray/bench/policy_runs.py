"""One simulation of one policy, and its numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from gllm_ray.bench.policy_hardware import deployment
from gllm_ray.bench.policy_scenarios import Contender, Scenario
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import SyntheticWorkloadConfig

_MEASURES: dict[str, Callable[[Report], float]] = {
    "tokens_per_s": lambda report: report.input_tokens_per_s + report.output_tokens_per_s,
    "ttft_p90_s": lambda report: report.ttft_s.p90,
    "ttft_p99_s": lambda report: report.ttft_s.p99,
    "tpot_p99_s": lambda report: report.tpot_s.p99,
    "itl_p99_s": lambda report: report.itl_s.p99,
    "queue_p50_s": lambda report: report.queue_s.p50,
    "e2e_mean_s": lambda report: report.e2e_s.mean,
    "utilization": lambda report: report.pipeline.utilization,
    "ideal_ratio": lambda report: report.ideal_ratio or 0.0,
    "wall_s": lambda report: report.wall_s,
    "num_preemptions": lambda report: report.num_preemptions,
}
Measures = dict[str, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Effort:
    """How much is simulated.

    Attributes:
        duration_s: Seconds in which requests come at each rate.
        max_requests: Of one run; at higher rates they come in a shorter time.
        num_offline: Requests of an offline batch.
        seeds: One run each; measures are their means.
        capacity_ratio: Of the lowest rate known to be too high to the highest known not to be,
            at which the search for a capacity ends.
    """

    duration_s: float = 128.0
    max_requests: int = 16_384
    num_offline: int = 5000
    seeds: tuple[int, ...] = (0, 1, 2)
    capacity_ratio: float = 1.05

    def quarter(self) -> "Effort":
        """A quarter of the requests of each run."""
        return replace(
            self,
            duration_s=self.duration_s / 4,
            max_requests=self.max_requests // 4,
            num_offline=self.num_offline // 4,
        )

    def num_requests(self, rate_per_s: float | None) -> int:
        """How many come at a rate; None: all at once."""
        if rate_per_s is None:
            return self.num_offline
        return max(1, min(self.max_requests, round(rate_per_s * self.duration_s)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One simulation.

    Attributes:
        contender: What is compared, and on what.
        rate_per_s: Requests a second; None: all at once.
        num_requests: How many come.
        seed: Of the requests.
    """

    contender: Contender
    rate_per_s: float | None
    num_requests: int
    seed: int


def simulate(case: Case) -> Measures:
    """What came of one case."""
    scenario, policy = case.contender.scenario, case.contender.policy
    requests = workload(scenario, case.rate_per_s, case.num_requests, case.seed)
    pipeline = deployment(scenario.hardware, policy)
    report = Simulation(pipeline, requests, seed=case.seed).run().report
    return {name: measure(report) for name, measure in _MEASURES.items()}


def workload(
    scenario: Scenario, rate_per_s: float | None, num_requests: int, seed: int
) -> Workload:
    """The requests of a scenario, the same ones for all policies and rates."""
    arrivals = "at_once" if rate_per_s is None else rate_per_s
    config = {"arrivals": arrivals, "lengths": scenario.lengths, "num_requests": num_requests}
    return Workload(SyntheticWorkloadConfig.model_validate(config), seed)


def at_rate(contender: Contender, effort: Effort, seed: int, rate_per_s: float | None) -> Case:
    """The case of one rate, of as many requests as come in the time; None: the offline batch."""
    return Case(
        contender=contender,
        rate_per_s=rate_per_s,
        num_requests=effort.num_requests(rate_per_s),
        seed=seed,
    )


def mean_of(group: Sequence[Measures]) -> Measures:
    """Each measure's mean."""
    return {name: fmean(measures[name] for measures in group) for name in group[0]}
