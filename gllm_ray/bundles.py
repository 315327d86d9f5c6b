"""What the placement group of a pipeline replica reserves.

Bundle 0 holds the replica and its scheduler; each of the others holds a stage.
"""

from gllm_ray.config import PipelineConfig, ServiceConfig

REPLICA_CPUS = 0.1
SCHEDULER_CPUS = 0.1
_ACCELERATOR_SHARE = 0.001  # what Ray's own `accelerator_type` option asks for


def bundles(config: ServiceConfig) -> list[dict[str, float]]:
    """The placement group's bundles, in order: replica and scheduler, then one per stage."""
    pipeline = config.pipeline
    stages = (_stage_bundle(pipeline, stage_id) for stage_id in range(pipeline.num_stages))
    return [{"CPU": REPLICA_CPUS + SCHEDULER_CPUS}, *stages]


def _stage_bundle(pipeline: PipelineConfig, stage_id: int) -> dict[str, float]:
    stage = pipeline.stage(stage_id)
    bundle = {"CPU": pipeline.cpus_per_stage}
    if pipeline.device == "cuda":
        bundle["GPU"] = pipeline.gpus_per_stage
    if stage.accelerator_type is not None:
        bundle[f"accelerator_type:{stage.accelerator_type}"] = _ACCELERATOR_SHARE
    return bundle | (stage.resources or {})
