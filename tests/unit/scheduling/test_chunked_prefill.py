from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.scheduling.policies import make_policy
from tests.factories import make_request, make_scheduler, result_of
from tests.unit.scheduling.views import view


@given(num_ready=st.integers(0, 5000), budget=st.integers(1, 4096))
def test_every_ready_decode_may_run_and_shares_the_budget_with_prefill(num_ready, budget):
    policy = make_policy(ChunkedPrefillConfig(token_budget=budget))
    decision = policy.budget(view(num_ready=num_ready))
    assert (decision.prefill_tokens, decision.decodes) == (budget, num_ready)
    assert decision.is_shared


def test_admission_leaves_the_watermark_free():
    scheduler = make_scheduler(
        num_stages=1,
        num_blocks=100,
        policy=ChunkedPrefillConfig(token_budget=4096, watermark=0.1),
        max_model_len=400,
    )
    scheduler.add(make_request("runs", num_prompt_tokens=200, max_tokens=8))  # 50 blocks
    scheduler.add(make_request("fits", num_prompt_tokens=160, max_tokens=8))  # 40: 10 are left
    scheduler.add(make_request("waits", num_prompt_tokens=4, max_tokens=8))
    batch = scheduler.schedule()
    assert [item.seq_id for item in batch.sequences] == [0, 1]
    assert scheduler.kv_utilization == 0.9
    scheduler.commit(result_of(batch))
    assert [item.seq_id for item in scheduler.schedule().sequences] == [0, 1]


def test_decodes_go_first_then_prompts_under_way_then_waiting_ones():
    scheduler = make_scheduler(num_stages=1, policy=ChunkedPrefillConfig(token_budget=16))
    scheduler.add(make_request("decode", num_prompt_tokens=4, max_tokens=9))
    scheduler.commit(result_of(scheduler.schedule()))
    scheduler.add(make_request("under way", num_prompt_tokens=20))
    scheduler.add(make_request("waiting", num_prompt_tokens=30))
    shares = []
    for _ in range(4):
        batch = scheduler.schedule()
        shares.append([(item.seq_id, item.num_scheduled_tokens) for item in batch.sequences])
        scheduler.commit(result_of(batch))
    assert shares == [
        [(0, 1), (1, 15)],
        [(0, 1), (1, 5), (2, 10)],
        [(0, 1), (1, 1), (2, 14)],
        [(0, 1), (1, 1), (2, 6)],
    ]


def test_prefill_gets_what_the_decodes_that_run_leave_not_those_that_are_ready():
    scheduler = make_scheduler(
        num_stages=1, max_decodes=2, policy=ChunkedPrefillConfig(token_budget=16)
    )
    for name in "abcd":
        scheduler.add(make_request(name, num_prompt_tokens=4, max_tokens=9))
    scheduler.commit(result_of(scheduler.schedule()))
    scheduler.add(make_request("waiting", num_prompt_tokens=30))
    shares = [(item.seq_id, item.num_scheduled_tokens) for item in scheduler.schedule().sequences]
    assert shares == [(0, 1), (1, 1), (4, 14)]
