"""Where the stages of one pipeline replica run.

Ray lays bundles over nodes in any order, so neighbours take bundles of the same node.
"""

from collections.abc import Mapping, Sequence
from functools import cache

from ray import PlacementGroupID
from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from gllm_ray.config import PipelineConfig, ServiceConfig
from gllm_ray.stages.actor import StageActor


def start_stage(
    config: ServiceConfig, stage_id: int, placement_group: PlacementGroup | None = None
) -> ActorHandle:
    """Ask Ray for one stage actor, which lives no longer than the calling process.

    Args:
        config: The replica's configuration.
        stage_id: Position in the pipeline, from 0.
        placement_group: Laid out as `bundles` says; None takes resources anywhere in the cluster.
    """
    pipeline, stage = config.pipeline, config.pipeline.stage(stage_id)
    strategy = None
    if placement_group is not None:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group,
            placement_group_bundle_index=_bundles_of_stages(placement_group.id)[stage_id],
        )
    return StageActor.options(
        num_cpus=pipeline.cpus_per_stage,
        num_gpus=pipeline.gpus_per_stage if pipeline.device == "cuda" else 0,
        accelerator_type=stage.accelerator_type,
        resources=stage.resources,
        runtime_env={"env_vars": stage_environment(pipeline)},
        scheduling_strategy=strategy,
    ).remote(config, stage_id)


# Asked once, because a bundle that has lost its node gets another one, and must keep its stage.
@cache
def _bundles_of_stages(group_id: PlacementGroupID) -> list[int]:
    table = placement_group_table(PlacementGroup(group_id))
    nodes, bundles = table["bundles_to_node_id"], table["bundles"]
    indices = range(1, len(bundles))
    order = order_by_node([bundles[i] for i in indices], [nodes.get(i, "") for i in indices])
    return [indices[place] for place in order]


def order_by_node(bundles: Sequence[Mapping[str, float]], nodes: Sequence[str]) -> list[int]:
    """Assign bundles to stages, so that neighbours share a node where they can.

    Args:
        bundles: What each stage needs, and each bundle has.
        nodes: Where each bundle lies.

    Returns:
        For each stage the index of its bundle, one like its own.
    """
    free, order = list(range(len(bundles))), []
    for wanted in bundles:
        alike = [i for i in free if bundles[i] == wanted]
        near = [i for i in alike if order and nodes[i] == nodes[order[-1]]]
        order.append((near or alike)[0])
        free.remove(order[-1])
    return order


def num_cpu_threads(pipeline: PipelineConfig) -> int:
    """Threads with which a stage computes on cpu."""
    return max(1, int(pipeline.cpus_per_stage))


def stage_environment(pipeline: PipelineConfig) -> dict[str, str]:
    """What must stand in a stage's environment before torch is imported there."""
    if pipeline.device == "cuda":
        return {**_NCCL_WITHOUT_END, **_NAME_LOOKUPS}
    return {
        "OMP_NUM_THREADS": str(num_cpu_threads(pipeline)),
        # Idle threads of one stage must not spin on the cores of another.
        "OMP_WAIT_POLICY": "PASSIVE",
        # Weights and KV cache in large pages: reading them is not held up by address translation.
        "THP_MEM_ALLOC_ENABLE": "1",
        **_NAME_LOOKUPS,
    }


# Else torch ends this process, with its weights, when it notices that a neighbour is gone, or first
# waits for minutes to write down what went on.
_NCCL_WITHOUT_END = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_DUMP_ON_TIMEOUT": "0",
    "TORCH_NCCL_WAIT_TIMEOUT_DUMP_MILSEC": "0",
    "TORCH_NCCL_TRACE_BUFFER_SIZE": "0",
}
# Torch looks up the name of each peer that it connects to. Where a name server loses a question,
# that would hold up a pipeline's repair for 5 s each time.
_NAME_LOOKUPS = {"RES_OPTIONS": "timeout:1 attempts:3"}
