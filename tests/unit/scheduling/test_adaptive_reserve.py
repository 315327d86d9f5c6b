import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import TokenThrottlingConfig
from gllm_ray.scheduling.policies import make_policy
from gllm_ray.scheduling.policies.adaptive_reserve import AdaptiveReserve
from tests.unit.scheduling.views import view

# 16,000 tokens to come are 1000 blocks of 16, so the reserve reads as the ratio in thousandths.
TO_COME = {"num_remaining_tokens": 16_000}


def blocks(reserve, **changes):
    return reserve.blocks(view(**(TO_COME | changes)))


def test_the_reserve_starts_at_70_percent_of_what_may_still_be_produced():
    assert blocks(AdaptiveReserve()) == 700


def test_each_micro_batch_lowers_it_by_2_thousandths_down_to_a_tenth():
    reserve = AdaptiveReserve()
    falling = [blocks(reserve, batch_id=i) for i in range(400)]
    assert falling[:3] == [700, 698, 696]
    assert falling[299:302] == pytest.approx([102, 100, 100], abs=1)
    assert falling[-1] == 100


def test_asking_again_for_the_same_micro_batch_does_not_lower_it():
    reserve = AdaptiveReserve()
    assert [blocks(reserve, batch_id=5) for _ in range(3)] == [690] * 3


def test_each_preemption_raises_it_by_5_hundredths_up_to_all():
    reserve = AdaptiveReserve()
    assert blocks(reserve, num_preemptions=2) == pytest.approx(800, abs=1)
    assert blocks(reserve, num_preemptions=2) == pytest.approx(800, abs=1)
    assert blocks(reserve, num_preemptions=50) == 1000
    assert blocks(reserve, num_preemptions=50, batch_id=10) == 980


def test_at_least_one_block_a_stage_is_kept():
    assert blocks(AdaptiveReserve(), num_remaining_tokens=0, num_stages=4) == 4


def test_it_takes_the_place_of_the_threshold_for_prefill_and_admission():
    policy = make_policy(TokenThrottlingConfig(kv_threshold="adaptive"))
    load = {"num_remaining_tokens": 4_571, "num_waiting_tokens": 100_000}  # 200 blocks at 0.7
    budget = policy.budget(view(**load))
    assert budget.reserved_blocks == 200
    assert budget.prefill_tokens == round(2048 * (0.6 - 0.2) / (1 - 0.2))
    assert policy.budget(view(**load, kv_free_ratio=0.19)).prefill_tokens == 0


@given(st.lists(st.tuples(st.integers(0, 600), st.integers(0, 30)), max_size=30))
def test_the_ratio_stays_between_a_tenth_and_all_whatever_happens(steps):
    reserve = AdaptiveReserve()
    batch_id = num_preemptions = 0
    for batches, preemptions in steps:
        batch_id, num_preemptions = batch_id + batches, num_preemptions + preemptions
        assert 100 <= blocks(reserve, batch_id=batch_id, num_preemptions=num_preemptions) <= 1000


@given(st.lists(st.tuples(st.integers(0, 200), st.integers(1, 256)), min_size=1, max_size=64))
def test_the_sum_differs_from_rounding_each_sequence_by_less_than_a_block_each(sequences):
    """Against the authors' formula: the sum over sequences of blocks beyond the last one's room."""
    needs = [
        -(-max(0, int(0.7 * remaining) - (-computed % 16)) // 16)
        for remaining, computed in sequences
    ]
    total = sum(remaining for remaining, _ in sequences)
    reserve = blocks(AdaptiveReserve(), num_remaining_tokens=total, num_stages=1)
    assert abs(reserve - max(1, sum(needs))) <= len(sequences) + 1
