"""`gllm-ray bench fidelity`: how far the simulator is from the engine that it simulates."""

import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from gllm_ray.assembly.engines import build_scheduler
from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.bench.host_costs import HostCosts, measure_host_costs, stage_intervals
from gllm_ray.bench.profile_grid import profile_grid
from gllm_ray.bench.replay import Replay, replay
from gllm_ray.bench.service_profile import describe_service, pipeline_limits, service_layout
from gllm_ray.bench.stage_profiler import StageProfiler
from gllm_ray.config import ServiceConfig
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import ConfigError
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.length_config import LengthsConfig
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.stage_profile import StageProfile, StageSample
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import (
    ArrivalsConfig,
    AtOnceArrivalsConfig,
    PoissonArrivalsConfig,
    SyntheticWorkloadConfig,
)
from gllm_ray.stages.ray_pipeline import RayPipeline, start_stage_group, stop_stages

_NUM_PROBES = 20

# Told what is done next.
OnStep = Callable[[str], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """What is compared; requests all have the same lengths, so their rate is the throughput."""

    requests_per_s: float
    ttft_p50_s: float
    ttft_p99_s: float
    tpot_p50_s: float
    tpot_p99_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One load on the engine and in the simulator.

    Attributes:
        load: Its name.
        rate_per_s: Requests a second; None: all at once.
        measured: What clients of the engine saw.
        simulated: What those of the simulator saw.
        load_average: Of the machine over the last minute, at the end.
    """

    load: str
    rate_per_s: float | None
    measured: Figures
    simulated: Figures
    load_average: float

    @property
    def errors(self) -> dict[str, float]:
        """Of each figure, as a share of what was measured."""
        simulated = asdict(self.simulated)
        return {name: simulated[name] / value - 1 for name, value in asdict(self.measured).items()}


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityResult:
    """The comparisons of one model.

    Attributes:
        provenance: Model, hardware, versions.
        host: What was measured beside the stages.
        client_s: From a client to the scheduler and back.
        comparisons: By load; the first one is saturated and tells the capacity.
    """

    provenance: str
    host: HostCosts
    client_s: float
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        comparisons = [asdict(c) | {"errors": c.errors} for c in self.comparisons]
        return asdict(self) | {"comparisons": comparisons}

    def table(self) -> str:
        """A line for each load and figure."""
        lines = [f"{'load':<12}{'figure':<16}{'engine':>12}{'simulator':>12}{'error':>9}"]
        for each in self.comparisons:
            measured, simulated = asdict(each.measured), asdict(each.simulated)
            for name, error in each.errors.items():
                cells = f"{measured[name]:>12.4g}{simulated[name]:>12.4g}{error:>+9.1%}"
                lines.append(f"{each.load:<12}{name:<16}{cells}")
        return "\n".join(lines)


async def bench_fidelity(
    config: ServiceConfig,
    lengths: LengthsConfig,
    *,
    num_requests: int,
    profile_s: float = 60.0,
    loads: Sequence[float] = (0.5, 0.85),
    seed: int = 0,
    on_step: OnStep,
) -> FidelityResult:
    """Profile the stages, then send the same requests to the engine and to the simulator.

    All requests at once tell the capacity; then they come as Poisson processes at shares of it.

    Args:
        config: What is served; Ray is connected to a cluster of this machine.
        lengths: Of prompts and outputs.
        num_requests: Of each load.
        profile_s: Seconds after which the profile's grid is cut short.
        loads: Shares of the capacity.
        seed: Of arrivals and lengths.
        on_step: Told what is done next.

    Raises:
        ConfigError: The model cannot be served or simulated, or the requests do not fit it.
        PipelineError: The engine broke.
    """
    layout = service_layout(config)
    if num_requests > (most := layout.model.vocab_size // 2 - 1):
        raise ConfigError(
            f"requests={num_requests}: must be <= {most}, because the vocabulary tells them apart"
        )
    profile, host = await _measure_parts(config, layout, profile_s, on_step)
    on_step("starting the engine")
    replica = await PipelineReplica.start(config)
    client = EngineClient(replica)
    await client.start()
    try:
        client_s = await _measure_client(client, replica, host)
        deployment = Deployment(
            cost=_pipeline_cost(layout, profile, host),
            make_scheduler=lambda: build_scheduler(
                config,
                num_blocks=replica.group.num_blocks,
                max_model_len=replica.group.max_model_len,
            ),
            timing=host.timing(layout.num_stages),
        )

        async def compare(load: str, arrivals: ArrivalsConfig) -> Comparison:
            on_step(f"load: {load}")
            workload = Workload(
                SyntheticWorkloadConfig(
                    arrivals=arrivals, lengths=lengths, num_requests=num_requests
                ),
                seed,
            )
            measured = await replay(client, workload, cache_salt=load)
            report = Simulation(deployment, workload).run().report
            return Comparison(
                load=load,
                rate_per_s=getattr(arrivals, "rate_per_s", None),
                measured=_measured_figures(measured),
                simulated=_simulated_figures(report, client_s),
                load_average=os.getloadavg()[0],
            )

        await compare("warm-up", AtOnceArrivalsConfig())
        comparisons = [await compare("all at once", AtOnceArrivalsConfig())]
        capacity_per_s = comparisons[0].measured.requests_per_s
        for share in loads:
            arrivals = PoissonArrivalsConfig(rate_per_s=share * capacity_per_s)
            comparisons.append(await compare(f"{share:.0%}", arrivals))
    finally:
        await client.close()
        await replica.close()
    return FidelityResult(
        provenance=profile.provenance,
        host=host,
        client_s=client_s,
        comparisons=tuple(comparisons),
    )


async def _measure_parts(
    config: ServiceConfig, layout: PipelineLayout, profile_s: float, on_step: OnStep
) -> tuple[StageProfile, HostCosts]:
    """The stages' times, with all of them computing side by side, and what comes on top."""
    on_step("starting the stages")
    group = await start_stage_group(config)
    try:
        on_step("profiling the stages")
        profiler = StageProfiler(RayPipeline(group), block_size=config.kv_cache.block_size)
        profile = await profiler.profile(
            profile_grid(pipeline_limits(config, group.num_blocks)),
            max_s=profile_s,
            provenance=describe_service(config, group.infos),
        )
        on_step("measuring the host")
        cost = MeasuredCost.from_profile(layout, profile)
        return profile, await measure_host_costs(config, group, cost)
    finally:
        await stop_stages(group.stages)


async def _measure_client(client: EngineClient, replica: PipelineReplica, host: HostCosts) -> float:
    """How much longer clients wait for a token than scheduler, stages and links take."""
    request = SimulatedRequest(arrival_s=0.0, num_prompt_tokens=1, num_output_tokens=1)
    waits_s = [
        (await replay(client, [request], cache_salt=f"probe {i}")).wall_s
        for i in range(_NUM_PROBES)
    ]
    stages = await stage_intervals(replica.group.stages)
    engine_s = host.schedule_s + host.schedule_sequence_s + host.dispatch_s + host.result_s
    return max(
        0.0,
        median(
            wait_s - (last.end_s - first.start_s) - engine_s
            for wait_s, first, last in zip(waits_s, stages[0], stages[-1], strict=True)
        ),
    )


def _pipeline_cost(layout: PipelineLayout, profile: StageProfile, host: HostCosts) -> MeasuredCost:
    """What each micro-batch holds a stage for while the engine runs beside it."""
    samples = [
        StageSample(
            **sample.load._asdict(),
            stage_times_s=[
                host.stage_slowdown * time_s + host.step_s for time_s in sample.stage_times_s
            ],
        )
        for sample in profile.samples
    ]
    return MeasuredCost.from_profile(layout, profile.model_copy(update={"samples": samples}))


def _measured_figures(result: Replay) -> Figures:
    return Figures(
        requests_per_s=result.ttft_s.count / result.wall_s,
        ttft_p50_s=result.ttft_s.quantile(0.5),
        ttft_p99_s=result.ttft_s.quantile(0.99),
        tpot_p50_s=result.tpot_s.quantile(0.5),
        tpot_p99_s=result.tpot_s.quantile(0.99),
    )


def _simulated_figures(report: Report, client_s: float) -> Figures:
    return Figures(
        requests_per_s=report.requests_per_s,
        ttft_p50_s=report.ttft_s.p50 + client_s,
        ttft_p99_s=report.ttft_s.p99 + client_s,
        tpot_p50_s=report.tpot_s.p50,
        tpot_p99_s=report.tpot_s.p99,
    )
