import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.config import TokenThrottlingConfig
from gllm_ray.scheduling.policies import LoadView, make_policy

POLICY = make_policy(TokenThrottlingConfig())


def view(**changes):
    values = {
        "batch_id": 0,
        "num_stages": 4,
        "num_waiting_tokens": 6144,
        "num_decoding": 96,
        "num_blocks": 1000,
        "kv_free_ratio": 0.6,
    }
    return LoadView(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "prefill_tokens"),
    [
        ({}, 768),  # the waiting term binds: 6144 / 8
        ({"num_waiting_tokens": 100_000}, 1186),  # the KV term: 2048 * 0.55 / 0.95
        ({"num_waiting_tokens": 40}, 32),  # the minimum
        ({"num_waiting_tokens": 100_000, "kv_free_ratio": 1.0}, 2048),  # the maximum
        ({"kv_free_ratio": 0.051}, 32),  # the minimum also bounds the KV term
        ({"kv_free_ratio": 0.049}, 0),  # the threshold suspends prefill
        ({"num_stages": 1}, 1186),  # one stage: nothing to spread
    ],
)
def test_prefill_budget_follows_the_papers_equations(changes, prefill_tokens):
    assert POLICY.budget(view(**changes)).prefill_tokens == prefill_tokens


@given(num_decoding=st.integers(0, 300), num_stages=st.integers(1, 8), first=st.integers(0, 99))
def test_decodes_of_one_round_cover_the_running_ones_evenly(num_decoding, num_stages, first):
    shares = [
        POLICY.budget(
            view(batch_id=first + i, num_stages=num_stages, num_decoding=num_decoding)
        ).decodes
        for i in range(num_stages)
    ]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) >= num_decoding - num_stages
    if num_decoding < num_stages:
        assert shares == [1] * num_stages
    else:
        remainder = num_decoding % num_stages
        assert sum(shares) in range(num_decoding - remainder, num_decoding - remainder + num_stages)


def test_admission_leaves_the_threshold_free():
    assert POLICY.budget(view(num_blocks=1001)).reserved_blocks == 51


@given(
    st.integers(0, 10**6),
    st.integers(0, 10**4),
    st.floats(0, 1),
    st.integers(1, 16),
    st.integers(0, 10**4),
)
def test_budgets_are_never_negative(waiting, decoding, free, stages, batch_id):
    budget = POLICY.budget(
        view(
            num_waiting_tokens=waiting,
            num_decoding=decoding,
            kv_free_ratio=free,
            num_stages=stages,
            batch_id=batch_id,
        )
    )
    assert 0 <= budget.prefill_tokens <= 2048
    assert budget.decodes >= 0
