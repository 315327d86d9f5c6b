"""`gllm-ray profile`: the stage times of a service on the machine that it will run on."""

import asyncio
import json
from collections.abc import Sequence
from typing import Any

import torch

from gllm_ray.bench.machine import describe_machine
from gllm_ray.bench.profile_grid import PipelineLimits, profile_grid
from gllm_ray.bench.stage_profiler import OnProgress, StageProfiler
from gllm_ray.config import ServiceConfig
from gllm_ray.messages import StageInfo
from gllm_ray.model.checkpoint import open_checkpoint
from gllm_ray.scheduling.calibrated_cost_model import CalibratedCostModel
from gllm_ray.simulation.cost_fit import fit_scheduler_cost
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.stage_profile import StageProfile
from gllm_ray.stages.local_pipeline import LocalPipeline
from gllm_ray.stages.placement import num_cpu_threads


def profile_service(
    config: ServiceConfig,
    *,
    max_s: float,
    repeats: int,
    on_progress: OnProgress | None = None,
) -> StageProfile:
    """Load every stage into this process, and measure one after the other.

    Args:
        config: The service; its stages compute with as many threads as they will have in it.
        max_s: Seconds after which the grid is cut short; loading comes on top.
        repeats: Of each micro-batch.
        on_progress: Told after each micro-batch.

    Raises:
        ConfigError: The model cannot be served with this configuration.
        PipelineError: A stage failed.
    """
    return asyncio.run(_profile_service(config, max_s, repeats, on_progress))


async def _profile_service(
    config: ServiceConfig, max_s: float, repeats: int, on_progress: OnProgress | None
) -> StageProfile:
    pipeline = LocalPipeline.start(config)
    if config.pipeline.device == "cpu":
        torch.set_num_threads(num_cpu_threads(config.pipeline))
    profiler = StageProfiler(pipeline, block_size=config.kv_cache.block_size, repeats=repeats)
    try:
        return await profiler.profile(
            profile_grid(pipeline_limits(config, pipeline.num_blocks)),
            max_s=max_s,
            provenance=f"{describe_service(config, pipeline.stages)}; one stage at a time",
            layers=[stage.last_layer - stage.first_layer for stage in pipeline.stages],
            on_progress=on_progress,
        )
    finally:
        await pipeline.close()


def pipeline_limits(config: ServiceConfig, num_blocks: int) -> PipelineLimits:
    """The largest micro-batch of a service whose stages have `num_blocks` KV blocks."""
    return PipelineLimits(
        max_decodes=config.scheduler.max_decodes,
        max_batch_tokens=config.scheduler.max_batch_tokens,
        max_model_len=open_checkpoint(config.model).max_model_len,
        num_blocks=num_blocks,
        block_size=config.kv_cache.block_size,
    )


def describe_service(config: ServiceConfig, stages: Sequence[StageInfo]) -> str:
    """Model, stages, hardware, threads and versions in one line."""
    pipeline = config.pipeline
    machine = describe_machine(pipeline.device)
    layers = " | ".join(f"{stage.first_layer}-{stage.last_layer - 1}" for stage in stages)
    parts = [
        f"{config.model.name}, {config.model.load_format}, dtype {config.model.dtype}",
        f"{len(stages)} stages of layers {layers}",
        f"{machine['hardware']}, {machine['num_cores']} cores",
        *([f"threads a stage: {num_cpu_threads(pipeline)}"] if pipeline.device == "cpu" else []),
        ", ".join(f"{name} {version}" for name, version in machine["versions"].items()),
        f"load average {machine['load_average'][0]}",
    ]
    return "; ".join(parts)


def service_layout(config: ServiceConfig) -> PipelineLayout:
    """The pipeline of a service as the simulator sees it.

    Raises:
        ConfigError: The shape of the model's architecture is not known.
    """
    directory = open_checkpoint(config.model).directory
    hf_config: dict[str, Any] = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    if config.model.dtype != "auto":
        hf_config["dtype"] = config.model.dtype
    shape = parse_model_shape(hf_config)
    if config.pipeline.layers == "auto":
        return PipelineLayout.split(shape, config.pipeline.num_stages)
    return PipelineLayout.explicit(shape, config.pipeline.layers)


def calibrate(layout: PipelineLayout, profile: StageProfile) -> CalibratedCostModel:
    """The scheduler's cost model that comes nearest to a profile.

    Raises:
        ConfigError: The measurements are too few or too noisy to tell what a row costs.
    """
    cost = MeasuredCost.from_profile(layout, profile)
    return fit_scheduler_cost(cost, f"fit to a profile: {profile.provenance}")
