"""Which replica a request goes to."""

from collections import Counter
from dataclasses import dataclass
from random import Random

import pytest

from gllm_ray.simulation.routing import Router
from gllm_ray.simulation.simulated_request import SimulatedRequest

REQUEST = SimulatedRequest(arrival_s=0.0, num_prompt_tokens=8, num_output_tokens=1)


@dataclass
class Load:
    num_requests: int


def test_round_robin_takes_turns_whatever_they_hold():
    router = Router("round_robin", Random(0))
    assert [router.choose([Load(9), Load(0), Load(5)], REQUEST) for _ in range(7)] == [
        0,
        1,
        2,
        0,
        1,
        2,
        0,
    ]


def test_least_outstanding_takes_the_fewest_requests_and_the_first_of_equals():
    router = Router("least_outstanding", Random(0))
    assert router.choose([Load(3), Load(1), Load(2)], REQUEST) == 1
    assert router.choose([Load(3), Load(1), Load(1)], REQUEST) == 1


def test_power_of_two_never_takes_the_fullest_and_takes_the_others_by_their_rank():
    router = Router("power_of_two", Random(0))
    loads = [Load(3), Load(0), Load(2), Load(1)]
    counts = Counter(router.choose(loads, REQUEST) for _ in range(6000))
    # Of the 6 pairs of 4 replicas 3 hold the emptiest, 2 more the next, 1 more the third.
    assert set(counts) == {1, 3, 2}
    for index, share in ((1, 3 / 6), (3, 2 / 6), (2, 1 / 6)):
        assert counts[index] / 6000 == pytest.approx(share, abs=0.03)


@pytest.mark.parametrize("num_replicas", [2, 4])
def test_power_of_two_takes_any_of_equals(num_replicas):
    router = Router("power_of_two", Random(0))
    loads = [Load(0)] * num_replicas
    counts = Counter(router.choose(loads, REQUEST) for _ in range(4000))
    for index in range(num_replicas):
        assert counts[index] / 4000 == pytest.approx(1 / num_replicas, abs=0.03)


def test_power_of_two_of_two_replicas_takes_the_emptier():
    router = Router("power_of_two", Random(0))
    assert all(router.choose([Load(2), Load(1)], REQUEST) == 1 for _ in range(50))


def test_power_of_two_spreads_requests_far_better_than_chance():
    def fullest(choose):
        loads = [Load(0) for _ in range(64)]
        for _ in range(64):
            loads[choose(loads)].num_requests += 1
        return max(load.num_requests for load in loads)

    rng = Random(1)
    router = Router("power_of_two", Random(1))
    assert fullest(lambda loads: router.choose(loads, REQUEST)) <= 3
    assert fullest(lambda loads: rng.randrange(len(loads))) >= 4
