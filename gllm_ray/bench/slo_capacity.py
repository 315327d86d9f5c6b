"""The highest rate at which a policy keeps limits."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import inf, sqrt

from gllm_ray.bench.policy_runs import Effort, Measures, at_rate, simulate
from gllm_ray.bench.policy_scenarios import Contender

_FIRST_STEP, _MAX_STEP = 1.1, 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Search:
    """A capacity to be found.

    Attributes:
        contender: Whose.
        effort: How many requests make a run, and how near the capacity has to be.
        seed: Of the requests.
        limits: The most that each of these measures may be.
        start_per_s: The rate to try first where none is known.
        least_per_s: A capacity below this counts as none.
        known: Rates that were run before, and whether the limits were kept.
    """

    contender: Contender
    effort: Effort
    seed: int
    limits: Mapping[str, float]
    start_per_s: float
    least_per_s: float
    known: Mapping[float, bool] = field(default_factory=dict)


def keeps(limits: Mapping[str, float], measures: Measures) -> bool:
    """Whether no measure is above its limit."""
    return all(measures[name] <= most for name, most in limits.items())


def slo_capacity(search: Search) -> float:
    """The highest rate that keeps the limits, below the lowest known that does not; 0 if none does.

    Steps grow until the capacity lies between two rates, whose ratio is then halved, as a
    logarithm, until it is that of the effort.
    """
    effort, step = search.effort, _FIRST_STEP
    high = min((rate for rate, is_kept in search.known.items() if not is_kept), default=inf)
    kept = (rate for rate, is_kept in search.known.items() if is_kept and rate < high)
    low = max(kept, default=0.0)
    while high > low * effort.capacity_ratio:
        if low and high < inf:
            rate = sqrt(low * high)
        elif low or high < inf:
            rate = low * step if low else high / step
            step = min(_MAX_STEP, step * step)
        else:
            rate = search.start_per_s
        if rate < search.least_per_s:
            return 0.0
        if keeps(search.limits, simulate(at_rate(search.contender, effort, search.seed, rate))):
            low = rate
        else:
            high = rate
    return low
