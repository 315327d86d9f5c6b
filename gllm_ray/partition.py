"""Arithmetic over stages: which layers each gets, and how many KV blocks all of them can hold."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageInfo


def split_layers(
    layer_weights: Sequence[int], embedding_weight: int, head_weight: int, num_stages: int
) -> list[tuple[int, int]]:
    """Cut the layers into contiguous stages so that the heaviest stage is as light as can be.

    Args:
        layer_weights: One per decoder layer, in any unit, such as parameters.
        embedding_weight: What the first stage holds besides its layers, in the same unit.
        head_weight: What the last stage holds besides its layers, in the same unit.
        num_stages: Every stage gets at least one layer.

    Returns:
        The half-open layer range of each stage, in order.

    Raises:
        ConfigError: There are more stages than layers.
    """
    num_layers = len(layer_weights)
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline.num_stages={num_stages}: the model has {num_layers} layers, and every stage "
            "needs at least one"
        )
    total = [0, *accumulate([*layer_weights[:-1], layer_weights[-1] + head_weight])]
    # heaviest[end]: the least heaviest stage when the stages so far hold the layers before `end`.
    heaviest = [embedding_weight + weight for weight in total]
    first_layers = []
    for stage in range(1, num_stages):
        best = [(0, 0)] * (num_layers + 1)
        for end in range(stage + 1, num_layers + 1):
            best[end] = min(
                (max(heaviest[cut], total[end] - total[cut]), cut) for cut in range(stage, end)
            )
        heaviest = [weight for weight, _ in best]
        first_layers.append([first for _, first in best])

    cuts = [num_layers]
    for firsts in reversed(first_layers):
        cuts.append(firsts[cuts[-1]])
    return list(pairwise([0, *reversed(cuts)]))


def explicit_layers(num_layers_per_stage: Sequence[int], num_layers: int) -> list[tuple[int, int]]:
    """The half-open layer ranges of stages whose sizes the operator gave.

    Raises:
        ConfigError: The sizes do not add up to the model's layers.
    """
    if sum(num_layers_per_stage) != num_layers:
        raise ConfigError(
            f"pipeline.layers={list(num_layers_per_stage)}: adds up to "
            f"{sum(num_layers_per_stage)} layers, but the model has {num_layers}"
        )
    return list(pairwise([0, *accumulate(num_layers_per_stage)]))


def size_kv_cache(stages: Sequence[StageInfo], block_size: int, max_model_len: int) -> int:
    """KV blocks the pipeline can use: what fits on every one of its stages.

    Raises:
        ConfigError: They would not hold one sequence of `max_model_len` tokens.
    """
    tightest = min(stages, key=lambda stage: stage.max_kv_blocks)
    num_blocks = tightest.max_kv_blocks
    needed = -(-max_model_len // block_size)
    if num_blocks < needed:
        raise ConfigError(
            f"the KV cache is too small: one sequence of max_model_len={max_model_len} tokens "
            f"needs {needed} blocks of {block_size}, that is "
            f"{needed * tightest.kv_block_bytes} bytes on stage {tightest.stage_id}, which has "
            f"room for {num_blocks} blocks ({num_blocks * tightest.kv_block_bytes} bytes); raise "
            "kv_cache.kv_cache_bytes or kv_cache.memory_utilization, add stages, or lower "
            "model.max_model_len"
        )
    return num_blocks


def describe_stage(stage: StageInfo) -> str:
    """One line for the log: layers, weights and KV blocks of a stage."""
    return (
        f"stage {stage.stage_id} on {stage.node}: layers {stage.first_layer}-"
        f"{stage.last_layer - 1}, {stage.num_parameters:,} parameters in "
        f"{stage.weight_bytes / 2**20:.1f} MiB, room for {stage.max_kv_blocks} KV blocks of "
        f"{stage.kv_block_bytes / 2**10:.1f} KiB, attention: {stage.attention}"
    )
