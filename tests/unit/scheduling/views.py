"""The load of the papers' worked example: 4 stages, 96 decodes, 6144 waiting, 60 % free."""

from typing import Any

from gllm_ray.scheduling.cost_model import LearntCostModel
from gllm_ray.scheduling.load import LoadView


def view(**changes: Any) -> LoadView:
    values: dict[str, Any] = {
        "now_s": 0.0,
        "batch_id": 0,
        "num_stages": 4,
        "num_waiting_tokens": 6144,
        "num_prefilling": 0,
        "prefill_start": 0,
        "num_decoding": 96,
        "num_ready": 24,
        "num_context_tokens": 96 * 64,
        "num_prefills_in_flight": 0,
        "num_remaining_tokens": 0,
        "oldest_token_s": 0.0,
        "num_preemptions": 0,
        "num_blocks": 1000,
        "num_free_blocks": 600,
        "block_size": 16,
        "kv_free_ratio": 0.6,
        "cost": LearntCostModel(),
        "waiting": (),
        "live": (),
    }
    return LoadView(**(values | changes))
