import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import TokenThrottlingConfig
from gllm_ray.scheduling.policies import make_policy
from tests.unit.scheduling.views import view

POLICY = make_policy(TokenThrottlingConfig())
PLENTY = {"num_waiting_tokens": 100_000}
FULL = {"kv_free_ratio": 0.0501}  # just above the threshold: the KV term rounds to 0


def prefill_tokens(options, changes):
    policy = make_policy(TokenThrottlingConfig(**options))
    return policy.budget(view(**changes)).prefill_tokens


def decodes(options, changes):
    policy = make_policy(TokenThrottlingConfig(**options))
    return [policy.budget(view(batch_id=i, **changes)).decodes for i in range(4)]


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 768),  # the waiting term binds: 6144 / 8
        (PLENTY, 1186),  # the KV term: 2048 * 0.55 / 0.95
        ({"num_waiting_tokens": 40}, 32),  # the minimum
        (PLENTY | {"kv_free_ratio": 1.0}, 2048),  # the maximum
        (FULL, 32),  # the minimum also bounds the KV term
        ({"kv_free_ratio": 0.049}, 0),  # the threshold suspends prefill
    ],
)
def test_prefill_budget_follows_equation_3_of_the_paper(changes, expected):
    assert prefill_tokens({}, changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 768),
        (PLENTY, 2048),
        ({"num_waiting_tokens": 40}, 32),
        (FULL, 768),
        ({"kv_free_ratio": 0.049}, 0),
    ],
)
def test_without_the_kv_term_prefill_follows_equation_1(changes, expected):
    assert prefill_tokens({"kv_term": False}, changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, 1186),
        ({"num_waiting_tokens": 40}, 1186),
        (FULL, 32),
        ({"kv_free_ratio": 0.049}, 0),
    ],
)
def test_without_the_waiting_term_prefill_follows_equation_2(changes, expected):
    assert prefill_tokens({"prefill_iterations": None}, changes) == expected


@pytest.mark.parametrize(
    ("changes", "expected"),
    [({}, 768), ({"num_waiting_tokens": 40}, 32), (FULL, 0), (FULL | {"kv_free_ratio": 0.06}, 22)],
)
def test_a_floor_of_the_waiting_term_leaves_the_kv_term_free_to_fall_to_0(changes, expected):
    assert prefill_tokens({"floor": "waiting_term"}, changes) == expected


@pytest.mark.parametrize(
    ("one_stage", "changes", "expected"),
    [
        ("exempt", {}, 2048),
        ("exempt", FULL, 2048),
        ("exempt", {"kv_free_ratio": 0.049}, 0),
        ("throttled", {}, 768),
        ("throttled", FULL, 32),
    ],
)
def test_one_stage_is_exempt_from_both_terms_but_not_from_the_threshold(
    one_stage, changes, expected
):
    assert prefill_tokens({"one_stage": one_stage}, {"num_stages": 1} | changes) == expected


@given(num_decoding=st.integers(0, 300), num_stages=st.integers(1, 8), first=st.integers(0, 99))
def test_decodes_of_one_round_cover_the_running_ones_evenly(num_decoding, num_stages, first):
    shares = [
        POLICY.budget(
            view(batch_id=first + i, num_stages=num_stages, num_decoding=num_decoding)
        ).decodes
        for i in range(num_stages)
    ]
    if num_decoding < num_stages:
        assert shares == [1] * num_stages
    else:
        # Each stage's turn of the rotation rounds up for `remainder` of the shares.
        assert max(shares) - min(shares) <= 1
        assert sum(shares) == num_decoding


@pytest.mark.parametrize(
    ("options", "changes", "expected"),
    [
        ({}, {}, [24] * 4),  # 96 decodes over 4 stages
        ({}, {"num_decoding": 97}, [24, 24, 24, 25]),  # the remainder takes its turn
        ({}, {"num_decoding": 3}, [1] * 4),
        ({"few_decodes": "all"}, {"num_decoding": 3}, [3] * 4),
        ({"few_decodes": "all"}, {"num_decoding": 4}, [1] * 4),
        ({"count_prefills": True}, {"num_prefills_in_flight": 4}, [25] * 4),
    ],
)
def test_decodes_follow_equation_4_and_the_options_that_change_it(options, changes, expected):
    assert decodes(options, changes) == expected


def test_admission_leaves_the_threshold_free():
    assert POLICY.budget(view(num_blocks=1001)).reserved_blocks == 51


OPTIONS = st.fixed_dictionaries(
    {
        "kv_term": st.booleans(),
        "kv_threshold": st.sampled_from([0.0, 0.05, 0.999, "adaptive"]),
        "floor": st.sampled_from(["budget", "waiting_term"]),
        "one_stage": st.sampled_from(["exempt", "throttled"]),
        "few_decodes": st.sampled_from(["one", "all"]),
        "count_prefills": st.booleans(),
    }
)
VIEWS = st.builds(
    view,
    num_waiting_tokens=st.integers(0, 10**6),
    num_decoding=st.integers(0, 10**4),
    num_ready=st.integers(0, 10**4),
    num_prefills_in_flight=st.integers(0, 10**4),
    num_remaining_tokens=st.integers(0, 10**7),
    num_preemptions=st.integers(0, 100),
    kv_free_ratio=st.floats(0, 1),
    num_stages=st.integers(1, 16),
    batch_id=st.integers(0, 10**4),
)


@given(OPTIONS, VIEWS)
def test_budgets_stay_in_their_bounds_for_any_load_and_options(options, load):
    budget = make_policy(TokenThrottlingConfig(**options)).budget(load)
    assert 0 <= budget.prefill_tokens <= 2048
    assert budget.decodes >= 0
    assert budget.reserved_blocks >= 0
