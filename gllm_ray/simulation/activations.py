"""What the largest micro-batch of a stage takes of its devices, beside weights and KV cache.

The engine measures it when it starts. This is about what transformers' layers and our sampler hold
at their peak without a compiler, rather more than less: of ten models on CPU 1.0 to 1.5 times what
is allocated.
"""

from gllm_ray.simulation.model_shape import AttentionShape, LayerShape, MlpShape, ModelShape
from gllm_ray.simulation.pipeline_layout import PipelineLayout

# Copies of a layer's rows that live at its peak: hidden states, those normed, and sums.
_ATTENTION_COPIES, _MLP_COPIES, _HEAD_COPIES = 3.5, 4.5, 3.0
# Queries and keys are rotated in pieces.
_QUERY_COPIES, _KEY_COPIES = 4.0, 3.5
_GATED_COPIES, _PLAIN_COPIES = 3, 5  # of an MLP's intermediate values
# The sampler works on at most so many logits at a time, in so many bytes each.
_SAMPLED_LOGITS, _SAMPLER_BYTES = 2**22, 24


def activation_bytes(layout: PipelineLayout, num_rows: int, *, has_graphs: bool) -> tuple[int, ...]:
    """About what each device of each stage needs for a micro-batch.

    Args:
        layout: The stages.
        num_rows: Most tokens of a micro-batch, which may all be drawn from.
        has_graphs: Decodes run from CUDA graphs, for whose memory the engine leaves as much again.
    """
    return tuple(
        round(_stage_bytes(layout, stage_id, num_rows)) * (1 + has_graphs)
        for stage_id in range(layout.num_stages)
    )


def _stage_bytes(layout: PipelineLayout, stage_id: int, num_rows: int) -> float:
    model, shards = layout.model, layout.tensor_parallel
    widest = max(_layer_values(layer, shards) for layer in set(layout.layers(stage_id)))
    layers_bytes = num_rows * widest * model.value_bytes
    if not layout.is_last(stage_id):
        return layers_bytes
    return max(layers_bytes, _head_bytes(model, num_rows))


def _layer_values(layer: LayerShape, shards: int) -> float:
    """Numbers for each row, where a layer holds most."""
    attention = _attention_values(layer.attention, layer.hidden_size, shards)
    return max(attention, _mlp_values(layer.mlp, layer.hidden_size, shards))


def _attention_values(attention: AttentionShape, hidden_size: int, shards: int) -> float:
    heads = attention.num_heads // shards
    kv_heads = max(1, attention.num_kv_heads // shards)
    queries = _QUERY_COPIES * heads * attention.key_dim
    keys = _KEY_COPIES * kv_heads * max(attention.key_dim, attention.value_dim)
    return _ATTENTION_COPIES * hidden_size + queries + keys


def _mlp_values(mlp: MlpShape, hidden_size: int, shards: int) -> float:
    copies = _GATED_COPIES if mlp.is_gated else _PLAIN_COPIES
    rows, width = _MLP_COPIES * hidden_size, copies * mlp.intermediate_size // shards
    if not mlp.num_experts:
        return rows + width
    # Rows are copied for each of the experts that they are routed to.
    return rows + mlp.num_experts_per_token * (rows + width) + copies * mlp.shared_size // shards


def _head_bytes(model: ModelShape, num_rows: int) -> float:
    logits = num_rows * model.vocab_size
    rows = _HEAD_COPIES * num_rows * model.hidden_size
    return (rows + logits) * model.value_bytes + min(logits, _SAMPLED_LOGITS) * _SAMPLER_BYTES
