"""Where the stages of one pipeline replica run."""

from ray.actor import ActorHandle
from ray.util.placement_group import PlacementGroup
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
    pipeline = config.pipeline
    strategy = None
    if placement_group is not None:
        strategy = PlacementGroupSchedulingStrategy(
            placement_group, placement_group_bundle_index=stage_id + 1
        )
    return StageActor.options(
        num_cpus=pipeline.cpus_per_stage,
        num_gpus=pipeline.gpus_per_stage if pipeline.device == "cuda" else 0,
        accelerator_type=pipeline.accelerator_type,
        runtime_env={"env_vars": stage_environment(pipeline)},
        scheduling_strategy=strategy,
    ).remote(config, stage_id)


def num_cpu_threads(pipeline: PipelineConfig) -> int:
    """Threads with which a stage computes on cpu."""
    return max(1, int(pipeline.cpus_per_stage))


def stage_environment(pipeline: PipelineConfig) -> dict[str, str]:
    """What must stand in a stage's environment before torch is imported there."""
    if pipeline.device == "cuda":
        return {}
    return {
        "OMP_NUM_THREADS": str(num_cpu_threads(pipeline)),
        # Idle threads of one stage must not spin on the cores of another.
        "OMP_WAIT_POLICY": "PASSIVE",
    }
