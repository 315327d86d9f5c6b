"""The papers' worked examples, decision by decision, on the scheduler itself."""

import pytest

from gllm_ray.policy_config import ChunkedPrefillConfig, TemporalConfig, TokenThrottlingConfig
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.scheduling.policies.temporal import TemporalPolicy
from tests.factories import make_request, make_scheduler, result_of
from tests.unit.scheduling.profiles import L20_LLAMA_13B
from tests.unit.scheduling.views import view_of


def load_of_96_decodes(policy):
    """4 stages, 96 ready decodes that hold 40 % of the blocks, then 6144 waiting tokens."""
    scheduler = make_scheduler(
        num_stages=4, num_blocks=480, block_size=16, max_model_len=1024, policy=policy
    )
    for index in range(96):
        scheduler.add(make_request(f"d{index}", num_prompt_tokens=17, max_tokens=256))
    while scheduler.load().num_waiting_tokens:
        scheduler.commit(result_of(scheduler.schedule()))
    for index in range(12):
        scheduler.add(make_request(f"w{index}", num_prompt_tokens=512, max_tokens=8))
    view = scheduler._view(now_s=0.0)
    assert (view.num_decoding, view.num_waiting_tokens, view.kv_free_ratio) == (96, 6144, 0.6)
    return scheduler


def trace(scheduler, count):
    """Decodes, then the prefill chunks, of the next micro-batches."""
    shares = []
    for _ in range(count):
        items = scheduler.schedule().sequences
        decodes = sum(item.seq_id < 96 for item in items)
        shares.append((decodes, [item.num_scheduled_tokens for item in items[decodes:]]))
    return shares


def test_token_throttling_runs_24_decodes_and_768_prefill_tokens_then_7_eighths_of_that():
    scheduler = load_of_96_decodes(TokenThrottlingConfig())
    assert trace(scheduler, 4) == [
        (24, [512, 256]),  # 6144 / 8
        (24, [256, 416]),  # 5376 / 8
        (24, [96, 492]),  # 4704 / 8
        (24, [20, 495]),  # 4116 / 8, rounded up
    ]
    assert scheduler.schedule() is None


def test_chunked_prefill_runs_all_96_decodes_at_once_then_prefill_alone():
    scheduler = load_of_96_decodes(ChunkedPrefillConfig(token_budget=512))
    assert trace(scheduler, 4) == [
        (96, [416]),  # 512 - 96
        (0, [96, 416]),
        (0, [96, 416]),
        (0, [96, 416]),
    ]
    assert scheduler.schedule() is None


@pytest.mark.parametrize(
    ("num_live", "num_prompts", "spatial", "temporal"),
    [(340, 1, 0.51, 0.74), (340, 100, 0.51, 0.99), (3, 1, 0.01, 0.63)],
)
def test_temporal_weighs_the_intensities_of_llama_13b_on_4_l20(
    num_live, num_prompts, spatial, temporal
):
    """85 decodes a stage, or one, and prompts of 180 tokens, each a micro-batch: all switch.

    The time of 180 tokens is 17.4 ms a stage; decodes read no context here.
    """
    assert L20_LLAMA_13B.stage_time(StepLoad(num_prefill_tokens=180)) == pytest.approx(17.4, 0.01)
    config = TemporalConfig(prefill_tokens=180, min_finished_ratio=0)
    policy = TemporalPolicy(config)
    live, prompts = [(180, 50)] * num_live, [(180, 50)] * num_prompts
    load = {"cost": L20_LLAMA_13B, "num_blocks": 20_000}
    lengths = [180] * num_prompts
    view = view_of(live, prompts, batch_id=4, **load)
    assert round(policy._spatial_intensity(view, num_live), 2) == spatial
    intensity = policy._temporal_intensity(view, lengths, num_live + num_prompts, 180 * num_live)
    assert round(intensity, 2) == temporal
    assert policy.budget(view_of(live, **load)).decodes > 0
    assert policy.budget(view).prefill_tokens == 180


def test_temporal_stays_with_3_decodes_where_they_will_need_nine_tenths_of_the_cache():
    policy = TemporalPolicy(TemporalConfig(min_finished_ratio=0))
    live = [(180, 4620)] * 3  # 300 blocks each at the end
    load = {"cost": L20_LLAMA_13B, "num_blocks": 1000}
    for batch_id in range(9):
        assert policy.budget(view_of(live, [(180, 50)], batch_id=batch_id, **load)).decodes > 0
