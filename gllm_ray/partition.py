"""Arithmetic over stages: which layers each gets, and how many KV blocks all of them can hold."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

from gllm_ray.errors import ConfigError
from gllm_ray.messages import StageInfo


def split_layers(
    layer_parameters: Sequence[int], head_parameters: int, num_stages: int
) -> list[tuple[int, int]]:
    """Cut the layers into contiguous stages so that the slowest stage is as fast as can be.

    A stage's time is taken to go with its parameters. A head counts half, for prefill computes it
    for the last row alone; an embedding counts nothing, for a lookup takes no time.

    Args:
        layer_parameters: One number per decoder layer.
        head_parameters: What the last stage computes after its layers.
        num_stages: Every stage gets at least one layer.

    Returns:
        The half-open layer range of each stage, in order.

    Raises:
        ConfigError: There are more stages than layers.
    """
    num_layers = len(layer_parameters)
    if num_stages > num_layers:
        raise ConfigError(
            f"pipeline.num_stages={num_stages}: the model has {num_layers} layers, and every stage "
            "needs at least one"
        )
    total = [0, *accumulate(2 * parameters for parameters in layer_parameters)]
    total[-1] += head_parameters
    # heaviest[end]: the least heaviest stage when the stages so far hold the layers before `end`.
    heaviest = total
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
