import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.scheduling.cost_model import LinearCostModel, with_chunk
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.load import StepLoad
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


COST = LinearCostModel(
    floor_s=4e-3,
    token_s=1.45e-4,
    context_token_s=1e-7,
    attention_pair_s=5e-9,
    tile=1,
)
SLO = ChunkedPrefillConfig(tbt_target_s=0.4)


def slo_budget(config=SLO, **changes):
    return make_policy(config).budget(view(**({"cost": COST} | changes))).prefill_tokens


def test_the_slo_budget_shrinks_as_the_deadline_nears_and_grows_back():
    budgets = [slo_budget(now_s=now_s) for now_s in (0.0, 0.1, 0.2, 0.3, 0.4, 5.0)]
    assert budgets == sorted(budgets, reverse=True)
    assert budgets[0] == 512
    assert len(set(budgets)) == 5
    assert slo_budget(now_s=5.0, oldest_token_s=5.0) == 512


@given(st.floats(0, 1), st.integers(0, 600), st.integers(0, 10**5))
def test_a_deadline_that_can_be_kept_is_kept_and_late_decodes_leave_32_tokens(
    waited_s, num_ready, context
):
    budget = slo_budget(
        now_s=waited_s, num_ready=num_ready, num_decoding=600, num_context_tokens=context
    )
    chunk = budget - num_ready
    if num_ready >= 512:
        assert budget == 512
    elif chunk > 32:
        decodes = StepLoad(num_ready, round(context * num_ready / 600))
        time_s = COST.stage_time(with_chunk(decodes, 0, chunk))
        assert 1.2 * 4 * time_s <= 0.4 - waited_s + 1e-12
        assert budget <= 512
    else:
        assert chunk == min(32, 512 - num_ready)


def test_while_none_is_ready_the_whole_target_is_left():
    assert slo_budget(num_ready=0, oldest_token_s=None, now_s=99.0) == 512
    tight = ChunkedPrefillConfig(tbt_target_s=0.1)
    assert 32 < slo_budget(tight, num_ready=0, oldest_token_s=None, now_s=99.0) < 512


@pytest.mark.parametrize(
    "changes",
    [
        {"cost": LearntCostModel()},
        {"num_decoding": 0, "num_ready": 0, "oldest_token_s": None, "num_context_tokens": 0},
    ],
    ids=["uncalibrated", "nothing decodes"],
)
def test_the_static_budget_holds_where_no_deadline_can_be_told(changes):
    assert slo_budget(**({"now_s": 5.0} | changes)) == 512


def test_without_a_target_the_budget_is_static():
    assert slo_budget(ChunkedPrefillConfig(), now_s=5.0) == 512
