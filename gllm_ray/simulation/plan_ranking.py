"""Which of the simulated deployments are the best: cost, SLO, frontier."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf
from typing import TypeVar

from gllm_ray.simulation.plan_config import PlanConfig, PlanSloConfig
from gllm_ray.simulation.planner import Choice, is_servable

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a simulation says of a choice.

    Attributes:
        choice: The deployment.
        latency_s: `ttft`, `tpot` and `e2e` at the percentile of the SLO.
        output_tokens_per_s: What it serves of the demand; see `Demand`.
        num_requests: Requests that ended.
        num_unfinished: Those of them that were refused or failed.
        utilization: Share of the time in which stages computed.
        first_error: Why the first request was refused that cannot be served; empty: none.
    """

    choice: Choice
    latency_s: dict[str, float]
    output_tokens_per_s: float
    num_requests: int
    num_unfinished: int
    utilization: float
    first_error: str = ""


def cost(config: PlanConfig, outcome: Outcome) -> float:
    """The price of a million output tokens; where GPUs have none, the number of GPUs."""
    price_per_hour = config.gpu(outcome.choice.cut.device).price_per_hour
    if price_per_hour is None:
        return outcome.choice.num_gpus
    if not outcome.output_tokens_per_s:
        return inf
    million_tokens_per_hour = outcome.output_tokens_per_s * 3600 / 1e6
    return price_per_hour * outcome.choice.num_gpus / million_tokens_per_hour


def violations(config: PlanConfig, outcome: Outcome) -> list[str]:
    """Which limits of the SLO a choice exceeds, and by how much; none: it meets it."""
    found = []
    for name, limit_s in _limits(config.slo).items():
        value_s = outcome.latency_s[name]
        if value_s > limit_s:
            found.append(
                f"p{config.slo.percentile} {name.upper()} {value_s:.4g} s > {limit_s:g} s "
                f"({value_s / limit_s:.3g} x)"
            )
    if outcome.num_unfinished:
        found.append(f"{outcome.num_unfinished} of {outcome.num_requests} requests not served")
    return found


def ranked(config: PlanConfig, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The best first: those that meet the SLO by their cost, then the others by their excess.

    Equals keep their order.
    """
    return sorted(
        outcomes,
        key=lambda outcome: (
            _excess(config, outcome),
            cost(config, outcome),
            outcome.latency_s[config.frontier],
        ),
    )


def frontier(points: Sequence[T], x: Callable[[T], float], y: Callable[[T], float]) -> list[T]:
    """Those that no other beats in x or y without being beaten in the other, by rising x.

    Of equal points the first is kept.
    """
    kept: list[T] = []
    for point in sorted(points, key=lambda point: (x(point), y(point))):
        if not kept or y(point) < y(kept[-1]):
            kept.append(point)
    return kept


def cost_frontier(config: PlanConfig, outcomes: Sequence[Outcome]) -> list[Outcome]:
    """The frontier of cost and latency over choices that serve every request."""
    served = [outcome for outcome in outcomes if not outcome.num_unfinished]
    return frontier(
        served,
        lambda outcome: cost(config, outcome),
        lambda outcome: outcome.latency_s[config.frontier],
    )


def finalists(config: PlanConfig, screened: Sequence[Outcome]) -> list[Choice]:
    """The choices that deserve a simulation of all their replicas, the best first.

    Those the service runs come first: with none among them there would be nothing to run.
    """
    best = ranked(config, screened)
    servable = [outcome for outcome in best if is_servable(outcome.choice)]
    num_finalists = config.search.num_finalists
    picked = [*servable[:num_finalists], *best[:num_finalists], *cost_frontier(config, screened)]
    return list(dict.fromkeys(outcome.choice for outcome in picked))


def _excess(config: PlanConfig, outcome: Outcome) -> float:
    """The worst limit's excess as a ratio, 0 if all are kept, infinite if requests are refused."""
    if outcome.num_unfinished:
        return inf
    limits = _limits(config.slo).items()
    return max([0.0, *(outcome.latency_s[name] / limit_s - 1 for name, limit_s in limits)])


def _limits(slo: PlanSloConfig) -> dict[str, float]:
    limits = {"ttft": slo.ttft_s, "tpot": slo.tpot_s, "e2e": slo.e2e_s}
    return {name: limit_s for name, limit_s in limits.items() if limit_s is not None}
