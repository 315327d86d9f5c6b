"""The papers' worked examples, decision by decision, on the scheduler itself."""

from gllm_ray.policy_config import ChunkedPrefillConfig, TokenThrottlingConfig
from tests.factories import make_request, make_scheduler, result_of


def load_of_96_decodes(policy):
    """4 stages, 96 ready decodes that hold 40 % of the blocks, then 6144 waiting tokens."""
    scheduler = make_scheduler(
        num_stages=4, num_blocks=480, block_size=16, max_model_len=1024, policy=policy
    )
    for index in range(96):
        scheduler.add(make_request(f"d{index}", num_prompt_tokens=17, max_tokens=256))
    while scheduler.num_waiting_tokens:
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
