"""Arrival times have the rate and the burstiness that was asked for."""

from itertools import islice, pairwise, takewhile
from random import Random
from statistics import fmean, pstdev

import pytest

from gllm_ray.simulation.arrivals import arrival_times
from gllm_ray.simulation.workload_config import (
    ArrivalStage,
    AtOnceArrivalsConfig,
    GammaArrivalsConfig,
    PoissonArrivalsConfig,
    StagedArrivalsConfig,
)

NUM_ARRIVALS = 100_000


def gaps(config, seed=0):
    times = [0.0, *islice(arrival_times(config, Random(seed)), NUM_ARRIVALS)]
    return [after - before for before, after in pairwise(times)]


def counts_by_stage(stages, num_cycles, seed=0):
    """Arrivals in each stage, over all cycles."""
    period_s = sum(stage.duration_s for stage in stages)
    times = arrival_times(StagedArrivalsConfig(stages=stages), Random(seed))
    counts = [0] * len(stages)
    for time_s in takewhile(lambda time_s: time_s < num_cycles * period_s, times):
        rest_s = time_s % period_s
        for index, stage in enumerate(stages):
            rest_s -= stage.duration_s
            if rest_s < 0:
                counts[index] += 1
                break
    return counts


def test_poisson_gaps_have_the_mean_of_the_rate_and_a_variation_of_1():
    drawn = gaps(PoissonArrivalsConfig(rate_per_s=8.0))
    assert fmean(drawn) == pytest.approx(1 / 8, rel=0.01)
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(1, rel=0.02)


def test_long_gaps_are_not_cut():
    drawn = gaps(PoissonArrivalsConfig(rate_per_s=1.0))
    share = sum(gap > 3 for gap in drawn) / NUM_ARRIVALS
    assert share == pytest.approx(0.0498, rel=0.05)  # exp(-3)


@pytest.mark.parametrize("shape", [0.25, 1.0, 4.0])
def test_gamma_gaps_vary_by_the_root_of_the_shape(shape):
    drawn = gaps(GammaArrivalsConfig(rate_per_s=2.0, shape=shape))
    assert fmean(drawn) == pytest.approx(0.5, rel=0.02)
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(shape**-0.5, rel=0.02)


def test_gamma_of_shape_1_is_poisson():
    assert gaps(GammaArrivalsConfig(rate_per_s=2.0, shape=1.0)) == gaps(
        PoissonArrivalsConfig(rate_per_s=2.0)
    )


def test_stages_have_their_rates_again_and_again():
    stages = (
        ArrivalStage(duration_s=2.0, rate_per_s=10.0),
        ArrivalStage(duration_s=3.0, rate_per_s=0.0),
        ArrivalStage(duration_s=1.0, rate_per_s=50.0),
    )
    low, none, high = counts_by_stage(stages, num_cycles=1000)
    assert low == pytest.approx(20_000, rel=0.03)
    assert none == 0
    assert high == pytest.approx(50_000, rel=0.02)


def test_stages_of_one_rate_are_a_poisson_process():
    stage = ArrivalStage(duration_s=0.1, rate_per_s=8.0)  # shorter than most gaps
    drawn = gaps(StagedArrivalsConfig(stages=(stage,)))
    assert fmean(drawn) == pytest.approx(1 / 8, rel=0.01)
    assert pstdev(drawn) / fmean(drawn) == pytest.approx(1, rel=0.02)


def test_an_offline_batch_is_there_at_the_start():
    times = islice(arrival_times(AtOnceArrivalsConfig(), Random(0)), 5)
    assert list(times) == [0.0] * 5


@pytest.mark.parametrize(
    "config",
    [
        PoissonArrivalsConfig(rate_per_s=3.0),
        GammaArrivalsConfig(rate_per_s=3.0, shape=0.1),
        StagedArrivalsConfig(stages=(ArrivalStage(duration_s=1.0, rate_per_s=3.0),)),
    ],
)
def test_arrivals_ascend_and_only_the_seed_tells_them(config):
    first, again, other = gaps(config), gaps(config), gaps(config, seed=1)
    assert min(first) >= 0
    assert first == again != other
