"""What the placement group of a pipeline replica reserves.

Bundle 0 holds the replica and its scheduler; bundle i + 1 holds stage i.
"""

from gllm_ray.config import ServiceConfig

REPLICA_CPUS = 0.1
SCHEDULER_CPUS = 0.1
_ACCELERATOR_SHARE = 0.001  # what Ray's own `accelerator_type` option asks for


def bundles(config: ServiceConfig) -> list[dict[str, float]]:
    """The placement group's bundles, in order: replica and scheduler, then one per stage."""
    pipeline = config.pipeline
    stage = {"CPU": pipeline.cpus_per_stage}
    if pipeline.device == "cuda":
        stage["GPU"] = pipeline.gpus_per_stage
    if pipeline.accelerator_type is not None:
        stage[f"accelerator_type:{pipeline.accelerator_type}"] = _ACCELERATOR_SHARE
    return [
        {"CPU": REPLICA_CPUS + SCHEDULER_CPUS},
        *(dict(stage) for _ in range(pipeline.num_stages)),
    ]
