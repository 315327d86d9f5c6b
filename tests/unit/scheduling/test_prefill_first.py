from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.policy_config import PrefillFirstConfig
from gllm_ray.scheduling.policies import make_policy
from tests.factories import make_request, make_scheduler, result_of
from tests.unit.scheduling.views import view_of

lengths = st.lists(st.integers(1, 300), max_size=8)


def budget(config, **changes):
    return make_policy(config).budget(view_of(**changes))


@given(waiting=lengths, num_live=st.integers(0, 40), num_blocks=st.integers(100, 400))
def test_a_micro_batch_is_prefill_alone_or_decodes_alone(waiting, num_live, num_blocks):
    decision = budget(
        PrefillFirstConfig(),
        live=[(32, 5)] * num_live,
        waiting=[(length, 5) for length in waiting],
        num_blocks=num_blocks,
    )
    assert (decision.prefill_tokens > 0) != (decision.decodes > 0)


@given(waiting=lengths.filter(bool), limit=st.integers(1, 900))
def test_the_budget_is_that_of_whole_prompts_unless_one_alone_exceeds_it(waiting, limit):
    decision = budget(
        PrefillFirstConfig(token_budget=limit), waiting=[(length, 5) for length in waiting]
    )
    sums = [sum(waiting[:count]) for count in range(1, len(waiting) + 1)]
    assert decision.prefill_tokens == max((s for s in sums if s <= limit), default=limit)


@given(num_live=st.integers(1, 200), num_stages=st.integers(1, 8))
def test_a_round_of_micro_batches_takes_every_decode_once_where_there_is_one_for_each_stage(
    num_live, num_stages
):
    shares = [
        budget(
            PrefillFirstConfig(), live=[(1, 5)] * num_live, num_stages=num_stages, batch_id=batch_id
        ).decodes
        for batch_id in range(num_stages)
    ]
    assert max(shares) - min(shares) <= 1
    assert sum(shares) == max(num_live, num_stages)


def test_decodes_run_while_the_next_prompt_does_not_fit_above_the_watermark():
    config = PrefillFirstConfig(watermark=0.1)
    live = [(16, 5)] * 80  # of 100 blocks
    assert budget(config, live=live, waiting=[(160, 5)], num_blocks=100).decodes == 0
    assert budget(config, live=live, waiting=[(161, 5)], num_blocks=100).decodes == 20


def test_whole_prompts_go_together_and_a_longer_one_is_cut_and_finished_alone():
    scheduler = make_scheduler(
        num_stages=1, policy=PrefillFirstConfig(token_budget=16, watermark=0), max_model_len=64
    )
    for name, length in {"a": 6, "b": 10, "long": 40, "c": 4}.items():
        scheduler.add(make_request(name, num_prompt_tokens=length, max_tokens=2))
    shares = []
    while not scheduler.is_idle:
        batch = scheduler.schedule()
        shares.append([(item.seq_id, item.num_scheduled_tokens) for item in batch.sequences])
        scheduler.commit(result_of(batch))
    assert shares == [
        [(0, 6), (1, 10)],
        [(2, 16)],
        [(2, 16)],
        [(2, 8)],
        [(3, 4)],
        [(0, 1), (1, 1), (2, 1), (3, 1)],
    ]
