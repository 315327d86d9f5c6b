"""Capacities, bounds and verdicts of the scoreboard."""

from dataclasses import replace
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.bench.policy_bounds import ideal_work_s, max_rate_per_s, offline_bound
from gllm_ray.bench.policy_goals import (
    capacity_goal,
    fixed_goal,
    frontier_goals,
    offline_goal,
    one_stage_comparison,
    slo_capacities,
)
from gllm_ray.bench.policy_hardware import pipeline_cost, round_trip_s
from gllm_ray.bench.policy_reproduction import claims
from gllm_ray.bench.policy_runs import Case, Effort, at_rate, simulate, workload
from gllm_ray.bench.policy_scenarios import (
    OURS,
    SCENARIOS,
    Contender,
    Scenario,
    contenders,
    slo_limits,
)
from gllm_ray.bench.sarathi_setups import SETUPS
from gllm_ray.bench.slo_capacity import Search, keeps, slo_capacity
from gllm_ray.bench.verdict import verdict
from gllm_ray.policy_config import PrefillFirstConfig
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.simulated_request import SimulatedRequest

L20 = SCENARIOS[0]
EFFORT = Effort(duration_s=1, max_requests=30, capacity_ratio=1.3)
LIMITS = slo_limits(L20) | {"ttft_p90_s": 0.6}


def request(num_prompt_tokens, num_output_tokens):
    return SimulatedRequest(
        arrival_s=0.0, num_prompt_tokens=num_prompt_tokens, num_output_tokens=num_output_tokens
    )


def search(**changes):
    values = {
        "contender": contenders(L20)["chunked_prefill 1024"],
        "effort": EFFORT,
        "seed": 0,
        "limits": LIMITS,
        "start_per_s": 8.0,
        "least_per_s": 1.0,
    }
    return Search(**(values | changes))


@pytest.mark.parametrize("known", [{}, {4.0: True}, {20.0: False}, {4.0: True, 20.0: False}])
def test_the_limits_hold_at_the_capacity_and_at_none_known_within_the_ratio_above(known):
    found = search(known=known)
    capacity = slo_capacity(found)

    def is_kept(rate_per_s):
        case = at_rate(found.contender, EFFORT, found.seed, rate_per_s)
        return keeps(found.limits, simulate(case))

    assert is_kept(capacity)
    above = [capacity * 1.3 ** (step / 2) for step in (1, 2)]
    assert not all(is_kept(rate) for rate in above)


def test_a_policy_that_keeps_the_limits_nowhere_has_no_capacity():
    assert slo_capacity(search(limits={"ttft_p90_s": 0.0})) == 0.0


def test_a_capacity_is_below_the_lowest_rate_known_to_be_too_high():
    effort = replace(EFFORT, capacity_ratio=4.0)
    known = {1.0: True, 2.0: False, 4.0: True}
    assert slo_capacity(search(effort=effort, known=known)) == 1.0


def test_the_work_of_requests_is_that_of_their_rows_reads_and_pairs():
    hardware = L20.hardware
    one = ideal_work_s(hardware, [request(1000, 1)])
    assert ideal_work_s(hardware, [request(1000, 1)] * 3) == pytest.approx(3 * one)
    cost = pipeline_cost(hardware)
    best_s = min(
        cost.stage_time_s(0, StepLoad(num_prefill_tokens=rows)) * 1000 / rows
        for rows in (256, 512, 1024, 2048)
    )
    assert one == pytest.approx(best_s, rel=0.05)  # attention to 1,000 tokens is the rest
    assert one > best_s


@pytest.mark.parametrize("scenario", [SCENARIOS[0], SCENARIOS[5]], ids=lambda each: each.name)
@pytest.mark.parametrize("num_requests", [1, 12])
def test_no_setting_is_faster_than_the_bound_of_a_batch(scenario, num_requests):
    bound = offline_bound(scenario.hardware, workload(scenario, None, num_requests, 0))
    for name, contender in contenders(scenario).items():
        if contender.scenario is scenario:
            case = Case(contender=contender, rate_per_s=None, num_requests=num_requests, seed=0)
            assert simulate(case)["wall_s"] >= bound.time_s, name


def test_a_request_alone_is_bound_by_a_round_trip_for_each_token():
    hardware = L20.hardware
    bound = offline_bound(hardware, [request(10, 400)])
    trip_s = round_trip_s(hardware, StepLoad(num_decodes=1, num_context_tokens=1))
    assert bound.time_s == pytest.approx(400 * trip_s)
    assert bound.ideal_ratio < 0.01


def test_many_short_requests_are_bound_by_their_work_and_the_fill():
    hardware = L20.hardware
    requests = [request(500, 1)] * 2000
    bound = offline_bound(hardware, requests)
    assert bound.time_s == bound.work_s + bound.fill_s
    assert bound.ideal_ratio > 0.99
    assert max_rate_per_s(hardware, requests) == pytest.approx(2000 / bound.work_s)


@given(least=st.floats(1.01, 5), width=st.floats(1, 2), ours=st.floats(0.1, 10))
def test_a_verdict_asks_for_the_direction_then_for_the_magnitude(least, width, ours):
    published = (least, least * width)
    said = verdict(published, ours, 0.5)
    assert (said == "not reproduced") == (ours <= 1)
    assert verdict(published, published[1], 0.0) == "reproduced"
    if said == "reproduced":
        assert 0.5 * published[0] <= ours <= 1.5 * published[1]


@pytest.mark.parametrize(
    ("published", "ours", "said"),
    [
        ((0.3, 0.37), 0.33, "reproduced"),
        ((0.3, 0.37), 0.8, "direction only"),
        ((0.3, 0.37), 1.2, "not reproduced"),
        ((2.0, 2.0), 1.0, "not reproduced"),
        ((1.0, inf), 1.01, "reproduced"),
        ((1.0, inf), 0.99, "not reproduced"),
    ],
)
def test_verdicts(published, ours, said):
    assert verdict(published, ours, 0.25) == said


def run(policy, rate, **measures):
    return {"policy": policy, "rate_per_s": rate, "wall_s": 100.0} | measures


def scenario_of(capacities, offline, at_one_rate=(), bounds=(10.0, 80.0, 0.9)):
    """Results by setting: capacities, offline tokens/s, and (tokens/s, TTFT, TPOT) at 1/s."""
    return {
        "slo_capacity_per_s": capacities,
        "runs": [
            *(
                run(name, None, tokens_per_s=value, utilization=0.98, ideal_ratio=0.96)
                for name, value in offline.items()
            ),
            *(
                run(name, 1.0, tokens_per_s=tokens, ttft_p90_s=ttft, tpot_p99_s=tpot)
                for name, tokens, ttft, tpot in at_one_rate
            ),
        ],
        "bounds": dict(zip(("max_rate_per_s", "offline_s", "ideal_ratio"), bounds, strict=True)),
    }


TP = "tensor parallel, chunked_prefill 512"


def test_capacity_is_compared_with_the_best_of_the_pipeline_and_with_the_ideal():
    goal = capacity_goal(scenario_of({OURS: 6.0, "a": 5.0, "b": 4.0, TP: 9.0}, {}))
    assert (goal.best, goal.ratio, goal.bound_ratio) == ("a", 1.2, 2.0)


def test_no_pipeline_counts_for_more_than_the_ideal_one_and_one_stage_is_another_pipeline():
    found = slo_capacities(scenario_of({OURS: 12.0, "a": 11.0, "b": 9.0, TP: 14.0}, {}))
    assert found == {OURS: 10.0, "a": 10.0, "b": 9.0, TP: 14.0}


def test_over_all_scenarios_one_setting_is_the_best_by_its_geometric_mean():
    scenarios = [
        scenario_of({OURS: 4.0, "a": 8.0, "b": 3.0, TP: 99.0}, {}),
        scenario_of({OURS: 4.0, "a": 0.5, "b": 3.0, TP: 99.0}, {}),
    ]
    goal = fixed_goal(scenarios)
    assert goal.best == "b"
    assert (goal.ratio, goal.bound_ratio) == (pytest.approx(4 / 3), pytest.approx(10 / 3))


def test_the_offline_bound_is_the_time_of_the_best_over_the_least_time():
    goal = offline_goal(scenario_of({}, {OURS: 110.0, "a": 100.0, TP: 500.0}))
    assert (goal.best, goal.ratio, goal.bound_ratio) == ("a", 1.1, 1.25)
    assert goal.is_saturated


def test_latencies_are_compared_with_those_of_comparable_throughput():
    runs = [
        (OURS, 100.0, 1.0, 0.1),
        ("slower, and so quick", 90.0, 0.1, 0.01),
        ("comparable", 99.0, 0.8, 0.2),
        (TP, 100.0, 0.1, 0.01),
    ]
    (goal,) = frontier_goals(scenario_of({}, {}, runs))
    assert (goal.throughput, goal.ttft, goal.tpot) == (pytest.approx(100 / 99), 1.25, 0.5)
    assert not goal.is_met


@pytest.mark.parametrize(
    ("others", "is_on_frontier"),
    [
        ([(99.0, 0.8, 0.2), (99.0, 2.0, 0.05)], True),  # each is better in one measure
        ([(99.0, 0.8, 0.1)], False),
        ([(90.0, 0.8, 0.05)], True),  # but slower
        ([], True),
    ],
)
def test_a_setting_is_on_the_frontier_unless_another_is_as_good_in_both_latencies(
    others, is_on_frontier
):
    runs = [(OURS, 100.0, 1.0, 0.1), ("slow", 50.0, 9.0, 9.0)]
    runs += [(str(index), *measures) for index, measures in enumerate(others)]
    (goal,) = frontier_goals(scenario_of({}, {}, runs))
    assert goal.is_on_frontier is is_on_frontier


def test_one_stage_counts_at_its_better_setting():
    other = "tensor parallel, chunked_prefill 2048"
    compared = one_stage_comparison(
        scenario_of({OURS: 6.0, TP: 3.0, other: 4.0}, {OURS: 50.0, TP: 100.0, other: 80.0})
    )
    assert (compared.capacity, compared.offline) == (1.5, 0.5)


def test_every_set_up_of_a_published_comparison_serves():
    runs = {contender for claim in claims() for contender in claim.runs}
    for contender in runs:
        case = Case(contender=contender, rate_per_s=None, num_requests=2, seed=0)
        assert simulate(case)["tokens_per_s"] > 0
    for setup in SETUPS:
        scenario = Scenario(hardware=setup.hardware, lengths="sharegpt", rates_per_s=(1,))
        contender = Contender(scenario=scenario, policy=PrefillFirstConfig())
        case = Case(contender=contender, rate_per_s=None, num_requests=2, seed=0)
        assert simulate(case)["tokens_per_s"] > 0
