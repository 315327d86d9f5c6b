"""What attention adds to a stage's time: a term for decodes, and one for prefill chunks."""

from collections.abc import Sequence
from typing import NamedTuple

from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.devices import Device
from gllm_ray.simulation.pipeline_layout import PipelineLayout

NO_WINDOW = 2**40


class AttentionCost(NamedTuple):
    """The attention of a stage's layers that look back equally far.

    Attributes:
        window: Positions a token attends to at most.
        context_token_s: A KV token that a decode reads.
        pair_s: A query-key pair of a prefill chunk.
    """

    window: int
    context_token_s: float
    pair_s: float


def attention_costs(layout: PipelineLayout, stage_id: int, device: Device) -> list[AttentionCost]:
    """The attention of a stage on each of its devices, one entry for each window.

    A decode reads its KV at the bandwidth reached, unless computing on it takes longer, as where
    many heads share a latent. A chunk attends to expanded latents; what it expands of those before
    it is not priced: a load does not tell how many there are.
    """
    model, shards = layout.model, layout.tensor_parallel
    flops = device.flops(model.dtype) * device.prefill_efficiency
    bandwidth = device.bandwidth_bytes_s * device.decode_efficiency
    costs: dict[int, AttentionCost] = {}
    for layer in layout.layers(stage_id):
        attention = layer.attention
        window = attention.window or NO_WINDOW
        moved_s = attention.cached_values(shards) * model.value_bytes / bandwidth
        context_token_s = max(moved_s, attention.decode_pair_flops(shards) / flops)
        pair_s = attention.prefill_pair_flops(shards) / flops
        before = costs.get(window, AttentionCost(window, 0.0, 0.0))
        costs[window] = AttentionCost(
            window, before.context_token_s + context_token_s, before.pair_s + pair_s
        )
    return list(costs.values())


def attention_time_s(costs: Sequence[AttentionCost], load: StepLoad, time_s: float = 0.0) -> float:
    """The sum over the layers; a window bounds the mean context of decodes and of chunks.

    Args:
        costs: Of a stage.
        load: What it computes.
        time_s: What to add to.
    """
    num_decodes, num_context_tokens, num_prefill_tokens, num_attention_pairs = load
    for window, context_token_s, pair_s in costs:
        time_s += context_token_s * min(num_context_tokens, window * num_decodes)
        time_s += pair_s * min(num_attention_pairs, window * num_prefill_tokens)
    return time_s
