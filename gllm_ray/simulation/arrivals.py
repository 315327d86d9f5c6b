"""Arrival times: gaps of mean 1, drawn one by one, stretched by a rate.

Gaps are never cut. Sarathi-Serve and Vidur cut them at three times their mean, so that their
real rate is 1.052 times the nominal one.
"""

from collections.abc import Iterator
from itertools import cycle, repeat
from random import Random

from gllm_ray.simulation.workload_config import (
    ArrivalsConfig,
    ArrivalStage,
    AtOnceArrivalsConfig,
    GammaArrivalsConfig,
    StagedArrivalsConfig,
)


def arrival_times(
    config: ArrivalsConfig,
    rng: Random,
) -> Iterator[float]:
    """Seconds from the start of a workload at which its requests come, ascending, without end.

    The first gap begins at 0, so the first request is as late as any other.
    """
    if isinstance(config, AtOnceArrivalsConfig):
        return repeat(0.0)
    if isinstance(config, StagedArrivalsConfig):
        return _staged(config.stages, rng)
    if isinstance(config, GammaArrivalsConfig):
        return _gamma(config.rate_per_s, config.shape, rng)
    return _gamma(config.rate_per_s, 1.0, rng)


def _gamma(rate_per_s: float, shape: float, rng: Random) -> Iterator[float]:
    now_s = 0.0
    while True:
        now_s += rng.gammavariate(shape, 1 / (shape * rate_per_s))
        yield now_s


def _staged(stages: tuple[ArrivalStage, ...], rng: Random) -> Iterator[float]:
    """A Poisson process of varying rate: unit gaps, used up in proportion to the rate."""
    begin_s = 0.0
    gap = rng.expovariate(1.0)
    for stage in cycle(stages):
        used_s = 0.0
        while stage.rate_per_s and used_s + gap / stage.rate_per_s <= stage.duration_s:
            used_s += gap / stage.rate_per_s
            yield begin_s + used_s
            gap = rng.expovariate(1.0)
        gap -= (stage.duration_s - used_s) * stage.rate_per_s
        begin_s += stage.duration_s
