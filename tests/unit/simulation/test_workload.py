"""Workloads: lazy, in order, the same for the same seed, and what their configuration says."""

import math
import tracemalloc
from collections import Counter
from itertools import islice, pairwise
from statistics import fmean, stdev

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from gllm_ray.simulation.simulated_request import (
    STOP_TOKEN_ID,
    SimulatedRequest,
    output_token_id,
    to_generation_request,
)
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import SyntheticWorkloadConfig, WorkloadConfig
from gllm_ray.strict_schema import StrictModel, find_mistakes

CONFIG = TypeAdapter(WorkloadConfig)


class Holder(StrictModel):
    """A file that holds a workload."""

    workload: WorkloadConfig


def requests_of(seed=0, **options):
    options = {"arrivals": 8, "lengths": "sharegpt", "num_requests": 1000} | options
    return list(Workload(CONFIG.validate_python(options), seed))


def trace_of(tmp_path, rows, **options):
    path = tmp_path / "trace.csv"
    path.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n" + rows)
    config = CONFIG.validate_python({"name": "trace", "path": str(path)} | options)
    return list(Workload(config, seed=0))


def test_the_same_seed_gives_the_same_requests_every_time():
    options = {
        "shared_prefixes": {"count": 5, "tokens": 10},
        "tenants": [{"name": "a"}, {"name": "b"}],
    }
    assert requests_of(**options) == requests_of(**options)
    assert requests_of(**options) != requests_of(seed=1, **options)
    workload = Workload(
        CONFIG.validate_python({"arrivals": 8, "lengths": "sharegpt", "num_requests": 9}), 0
    )
    assert list(workload) == list(workload)


def test_requests_come_in_order():
    times = [each.arrival_s for each in requests_of()]
    assert all(before <= after for before, after in pairwise(times))


def test_a_workload_of_many_requests_takes_no_memory():
    config = CONFIG.validate_python(
        {"arrivals": 8, "lengths": "azure_conversation", "num_requests": 10**7}
    )
    tracemalloc.start()
    count = sum(1 for _ in islice(Workload(config, 0), 20_000))
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert count == 20_000
    assert peak_bytes < 100_000


def test_another_rate_leaves_the_lengths_and_scales_the_times():
    slow, fast = requests_of(), requests_of(rate_scale=4)
    assert [each.num_prompt_tokens for each in slow] == [each.num_prompt_tokens for each in fast]
    assert [each.arrival_s / 4 for each in slow] == [each.arrival_s for each in fast]
    assert [each.num_output_tokens for each in requests_of(arrivals=99)] == [
        each.num_output_tokens for each in slow
    ]


def test_a_workload_ends_by_its_number_or_by_its_time():
    assert len(requests_of(num_requests=7)) == 7
    times = [each.arrival_s for each in requests_of(num_requests=None, duration_s=50)]
    assert len(times) == pytest.approx(400, abs=80)
    assert max(times) <= 50
    assert len(requests_of(num_requests=7, duration_s=50)) == 7


def test_prefixes_are_as_popular_as_zipf_says():
    requests = requests_of(
        num_requests=20_000,
        lengths={"prompt": 5, "output": 2},
        shared_prefixes={"count": 3, "tokens": 64, "zipf_exponent": 1.0},
    )
    assert {each.num_prompt_tokens for each in requests} == {69}
    assert {each.num_prefix_tokens for each in requests} == {64}
    counts = Counter(each.prefix_id for each in requests)
    harmonic = 1 + 1 / 2 + 1 / 3
    assert [counts[rank] / 20_000 for rank in range(3)] == pytest.approx(
        [1 / harmonic, 1 / 2 / harmonic, 1 / 3 / harmonic], rel=0.04
    )


def test_tenants_send_their_shares_at_their_priorities():
    requests = requests_of(
        num_requests=20_000,
        tenants=[{"name": "a", "share": 3.0}, {"name": "b", "priority": 1}],
    )
    counts = Counter((each.tenant, each.priority) for each in requests)
    assert set(counts) == {("a", 0), ("b", 1)}
    assert counts["a", 0] / 20_000 == pytest.approx(0.75, rel=0.02)


def test_a_trace_is_replayed_within_its_window_at_its_scale(tmp_path):
    rows = "".join(f"{second},{second + 1},9\n" for second in range(10))
    requests = trace_of(tmp_path, rows, start_s=2, end_s=8, rate_scale=2, num_requests=5)
    assert [each.arrival_s for each in requests] == [0, 0.5, 1, 1.5, 2]
    assert [each.num_prompt_tokens for each in requests] == [3, 4, 5, 6, 7]
    assert len(trace_of(tmp_path, rows, start_s=2, end_s=8)) == 6
    assert len(trace_of(tmp_path, rows, duration_s=3.5)) == 4


def test_a_trace_may_give_the_lengths_alone(tmp_path):
    rows = "9,1,2\n3,4,5\n"
    requests = trace_of(tmp_path, rows, arrivals="at_once")
    assert [(each.arrival_s, each.num_prompt_tokens) for each in requests] == [(0, 1), (0, 4)]
    assert [each.arrival_s for each in trace_of(tmp_path, rows, arrivals=8)] == [
        each.arrival_s for each in requests_of(num_requests=2)
    ]


MISTAKES = [
    ({"arrivals": "soon"}, "arrivals='soon': must be poisson, gamma, staged or at_once"),
    ({"arrivals": -1}, "arrivals=-1: must be a rate from 1e-06 to 1e+06 requests a second"),
    ({"arrivals": True}, "arrivals=true: must be poisson"),
    ({"arrivals": {"name": "gamma", "rate_per_s": 1}}, "arrivals.shape: required"),
    (
        {"arrivals": {"name": "staged", "stages": [{"duration_s": 1, "rate_per_s": 0}]}},
        "arrivals.stages=[...]: must have a rate_per_s > 0",
    ),
    ({"arrivals": {"name": "staged", "stages": []}}, "arrivals.stages=[]: must be"),
    ({"arrivals": "at_once", "num_requests": None}, "num_requests=null: must be given when arr"),
    ({"num_requests": None}, "num_requests=null: must be given when duration_s is not"),
    ({"lengths": "sharegtp"}, "lengths='sharegtp': must be a dataset (sharegpt, sharegpt_8k"),
    ({"lengths": {"prompt": 0, "output": 1}}, "lengths.prompt=0: must be a number of tokens from"),
    (
        {"lengths": {"prompt": 10**9, "output": 1}},
        "lengths.prompt=1000000000: must be a number of tokens from 1 to 16777216",
    ),
    ({"arrivals": 1e9}, "arrivals=1000000000.0: must be a rate from 1e-06 to 1e+06"),
    ({"num_requests": 10**12}, "num_requests=1000000000000: must be an integer from 1 to 10000000"),
    (
        {"arrivals": 1000, "num_requests": None, "duration_s": 1e6},
        "duration_s=1e+06: about 1e+09 requests come in it; must be at most 10000000: shorten it",
    ),
    (
        {
            "arrivals": {
                "name": "staged",
                "stages": [
                    {"duration_s": 10, "rate_per_s": 6},
                    {"duration_s": 10, "rate_per_s": 0},
                ],
            },
            "num_requests": None,
            "duration_s": 1e5,
            "rate_scale": 100,
        },
        "duration_s=100000: about 3e+07 requests come in it; must be at most 10000000",
    ),
    (
        {"arrivals": {"name": "staged", "stages": [{"duration_s": 1e-4, "rate_per_s": 1e-2}]}},
        "arrivals.stages=[...]: bring 1e-06 requests a round; must bring 0.001 or more",
    ),
    (
        {"shared_prefixes": {"count": 10**9, "tokens": 1}},
        "shared_prefixes.count=1000000000: must be an integer from 1 to 1000000",
    ),
    (
        {"lengths": {"prompt": 1, "output": {"name": "uniform", "min_tokens": 3, "max_tokens": 2}}},
        "lengths.output.min_tokens=3: must be <= max_tokens=2",
    ),
    (
        {
            "lengths": {
                "prompt": 1,
                "output": {"name": "lognormal", "median_tokens": 9, "sigma": 1, "max_tokens": 8},
            }
        },
        "lengths.output.median_tokens=9: must be <= max_tokens=8",
    ),
    ({"rate_scale": 0}, "rate_scale=0: must be a number from 1e-06 to 1000000.0"),
    ({"name": "trace", "path": "a.txt"}, "path='a.txt': must end in .csv or .jsonl"),
    ({"name": "trace", "path": "a.csv", "start_s": 3, "end_s": 2}, "end_s=2: must be > start_s=3"),
    (
        {"name": "trace", "path": "a.csv", "arrivals": 8, "start_s": 3},
        "start_s=3.0: must be left out when arrivals is poisson",
    ),
    ({"name": "tarce"}, "name='tarce': must be synthetic or trace"),
]


@pytest.mark.parametrize(("options", "message"), MISTAKES)
def test_a_mistake_is_told_in_one_line(options, message):
    good = {"arrivals": 8, "lengths": "sharegpt", "num_requests": 9}
    workload = options if "name" in options else good | options
    assert find_mistakes(Holder, {"workload": good}) == []
    [line] = find_mistakes(Holder, {"workload": workload})
    assert line.startswith(f"workload.{message}")


def test_a_dataset_brings_the_length_it_was_cut_to():
    config = CONFIG.validate_python({"arrivals": 8, "lengths": "sharegpt_8k", "num_requests": 9})
    assert isinstance(config, SyntheticWorkloadConfig)
    assert config.lengths.max_total_tokens == 8192


def request(num_prompt_tokens, num_output_tokens=3, **others):
    return SimulatedRequest(
        arrival_s=0.0,
        num_prompt_tokens=num_prompt_tokens,
        num_output_tokens=num_output_tokens,
        **others,
    )


prompts = st.tuples(st.none() | st.integers(0, 3), st.integers(1, 40), st.integers(0, 40)).map(
    lambda drawn: (
        request(max(1, drawn[2]))
        if drawn[0] is None
        else request(drawn[1] + drawn[2], prefix_id=drawn[0], num_prefix_tokens=drawn[1])
    )
)


@given(st.lists(prompts, min_size=2, max_size=8))
def test_prompts_have_exactly_their_prefix_in_common(requests):
    token_ids = [
        to_generation_request(each, index).prompt_token_ids for index, each in enumerate(requests)
    ]
    for (first, first_ids), (second, second_ids) in pairwise(zip(requests, token_ids, strict=True)):
        assert len(first_ids) == first.num_prompt_tokens
        num_common = 0
        while first_ids[num_common : num_common + 1] == second_ids[num_common : num_common + 1]:
            num_common += 1
            if num_common > len(first_ids):
                break
        shared = (
            min(first.num_prefix_tokens, second.num_prefix_tokens)
            if first.prefix_id is not None and first.prefix_id == second.prefix_id
            else 0
        )
        assert min(num_common, len(first_ids), len(second_ids)) == shared


def test_what_a_client_says_of_itself_is_handed_on():
    said = {"tenant": "a", "priority": -2, "expected_output_tokens": 9}
    generation = to_generation_request(request(4, **said), 17)
    assert generation.request_id == "17"
    assert {key: getattr(generation, key) for key in said} == said


def test_the_scheduler_knows_a_length_that_the_client_asks_for():
    generation = to_generation_request(request(4, num_output_tokens=3), 0)
    assert (generation.max_tokens, generation.stop_token_ids) == (3, frozenset())


def test_the_scheduler_learns_of_the_end_from_the_stop_token_alone():
    simulated = request(4, num_output_tokens=3, max_tokens=100)
    generation = to_generation_request(simulated, 0)
    assert (generation.max_tokens, generation.stop_token_ids) == (100, {STOP_TOKEN_ID})
    tokens = [output_token_id(simulated, position) for position in range(3)]
    assert [token in generation.stop_token_ids for token in tokens] == [False, False, True]


def test_a_workload_may_hide_all_lengths():
    assert {each.max_tokens for each in requests_of(max_tokens=4096)} == {4096}
    assert {each.max_tokens for each in requests_of()} == {None}


def test_clients_say_how_long_outputs_will_be_as_well_as_they_know():
    silent, knowing = requests_of(), requests_of(hint_sigma=0)
    assert {each.expected_output_tokens for each in silent} == {None}
    assert [each.expected_output_tokens for each in knowing] == [
        each.num_output_tokens for each in silent
    ]
    guessing = requests_of(hint_sigma=0.5, lengths={"prompt": 9, "output": 1000})
    errors = [math.log(each.expected_output_tokens / each.num_output_tokens) for each in guessing]
    assert fmean(errors) == pytest.approx(0, abs=0.05)
    assert stdev(errors) == pytest.approx(0.5, rel=0.1)


def test_a_share_of_the_requests_says_the_same_as_it_does_among_all():
    config = CONFIG.validate_python(
        {"arrivals": 8, "lengths": "sharegpt", "num_requests": 100, "hint_sigma": 1}
    )
    assert set(Workload(config, 0, share=4)) < set(Workload(config, 0))
