"""A scheduler, and an engine over a pipeline, from a configuration."""

from pathlib import Path

from gllm_ray.config import SchedulerConfig, ServiceConfig
from gllm_ray.engine.engine import Engine
from gllm_ray.engine.length_log import LoggedPredictor
from gllm_ray.engine.supervisor import Supervisor
from gllm_ray.interfaces import Pipeline
from gllm_ray.scheduler_factory import make_cost_model, make_length_predictor, make_settings
from gllm_ray.scheduling import Scheduler, make_policy
from gllm_ray.scheduling.length_predictor import LengthPredictor


def build_engine(
    config: ServiceConfig,
    pipeline: Pipeline,
    *,
    num_blocks: int,
    max_model_len: int,
    supervisor: Supervisor | None = None,
) -> Engine:
    """An engine over a running pipeline whose stages have `num_blocks` KV blocks each."""
    scheduler = build_scheduler(config, num_blocks=num_blocks, max_model_len=max_model_len)
    return Engine(scheduler, pipeline, supervisor)


def build_scheduler(config: ServiceConfig, *, num_blocks: int, max_model_len: int) -> Scheduler:
    """A scheduler for stages that have `num_blocks` KV blocks each."""
    settings = make_settings(
        config.scheduler,
        config.pipeline,
        num_blocks=num_blocks,
        block_size=config.kv_cache.block_size,
        max_model_len=max_model_len,
    )
    return Scheduler(
        make_policy(config.scheduler.policy),
        settings,
        cost=make_cost_model(config.scheduler),
        predictor=build_length_predictor(config.scheduler),
    )


def build_length_predictor(config: SchedulerConfig) -> LengthPredictor:
    """The predictor that a configuration names; with a log if that names one, too.

    Raises:
        ConfigError: The classifier's file cannot be read, or is none.
    """
    predictor = make_length_predictor(config.length_predictor)
    if config.length_log is None:
        return predictor
    return LoggedPredictor(predictor, Path(config.length_log), config.length_log_max_bytes)
