"""Runs the simulation that a configuration describes."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from gllm_ray.scheduler_factory import make_cost_model, make_length_predictor, make_settings
from gllm_ray.scheduling import Scheduler, make_policy
from gllm_ray.simulation.cost_fit import fit_scheduler_cost
from gllm_ray.simulation.deployment import Deployment, StageLoss
from gllm_ray.simulation.hardware import Hardware, build_hardware, uncalibrated
from gllm_ray.simulation.metrics import Slo
from gllm_ray.simulation.simulation_config import (
    SimulationConfig,
    TimingConfig,
    load_simulation_config,
    parse_simulation_config,
)
from gllm_ray.simulation.simulator import Simulation, SimulationResult
from gllm_ray.simulation.virtual_pipeline import Slowdown, Timing
from gllm_ray.simulation.workload import Workload


def simulate(
    config: SimulationConfig | Mapping[str, Any] | str | PathLike[str],
    *,
    keep_intervals: bool = False,
) -> SimulationResult:
    """Let a deployment serve a workload in virtual time.

    The same configuration gives the same result, and nothing but the files it names is read.

    Args:
        config: What a file under configs/simulation holds, as a value, as a mapping, or its path;
            paths in it are relative to the file, or else to the working directory.
        keep_intervals: Keep when each stage computed; memory then grows with the run.

    Raises:
        ConfigError: One line for each mistake in the configuration, or what does not fit.
    """
    if isinstance(config, str | PathLike):
        config = load_simulation_config(Path(config))
    elif not isinstance(config, SimulationConfig):
        config = parse_simulation_config(config)
    result = Simulation(
        build_deployment(config),
        Workload(config.workload, config.seed),
        seed=config.seed,
        slo=None if config.slo is None else Slo(**dict(config.slo)),
        keep_intervals=keep_intervals,
    ).run()
    report = replace(result.report, nominal_constants=tuple(uncalibrated(config.hardware)))
    return replace(result, report=report)


def build_deployment(config: SimulationConfig) -> Deployment:
    """What serves.

    Raises:
        ConfigError: A file cannot be read, or the model does not fit.
    """
    hardware = build_hardware(config)
    return Deployment(
        cost=hardware.cost,
        make_scheduler=_scheduler_factory(config, hardware),
        timing=_timing(config.timing, hardware),
        num_replicas=config.num_replicas,
        routing=config.routing,
        scaling=config.autoscaling,
        losses=tuple(StageLoss(**dict(loss)) for loss in config.losses),
    )


def _scheduler_factory(config: SimulationConfig, hardware: Hardware) -> Callable[[], Scheduler]:
    options = config.scheduler
    settings = make_settings(
        options,
        config.pipeline,
        num_blocks=hardware.num_blocks,
        block_size=config.kv_cache.block_size,
        max_model_len=hardware.max_model_len,
    )
    is_fitted = options.cost_calibration is None and config.cost_model == "fitted"
    fit = fit_scheduler_cost(hardware.cost, "the simulated stage times") if is_fitted else None

    def make_scheduler() -> Scheduler:
        return Scheduler(
            make_policy(options.policy),
            settings,
            cost=fit or make_cost_model(options),
            predictor=make_length_predictor(options.length_predictor),
        )

    return make_scheduler


def _timing(config: TimingConfig, hardware: Hardware) -> Timing:
    slowdowns = tuple(Slowdown(**dict(slowdown)) for slowdown in config.slowdowns)
    return Timing(links=hardware.links, **dict(config) | {"slowdowns": slowdowns})
