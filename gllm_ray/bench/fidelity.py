"""`gllm-ray bench fidelity`: how far the simulator is from the engine that it simulates."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields
from math import exp, fsum
from statistics import fmean
from typing import Any

from gllm_ray.assembly.engines import build_scheduler
from gllm_ray.bench.recorded_service import RecordedReplay, RecordedService
from gllm_ray.bench.replay import Replay
from gllm_ray.bench.service_costs import ServiceCosts, fit_service_costs
from gllm_ray.bench.service_profile import describe_service, service_layout
from gllm_ray.config import ServiceConfig
from gllm_ray.errors import ConfigError
from gllm_ray.simulation.length_config import LengthsConfig
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.simulator import Deployment, Simulation
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import (
    ArrivalsConfig,
    AtOnceArrivalsConfig,
    PoissonArrivalsConfig,
    SyntheticWorkloadConfig,
)

_CALIBRATION_SHARE = 0.65  # of the capacity; the other calibration is all at once

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
class FigureError:
    """A figure of the engine and of the simulator.

    Attributes:
        name: That of the figure.
        measured: Its mean over the repeats on the engine.
        simulated: Its mean over those in the simulator.
        error: What the simulator is off, as a share of what was measured.
        noise: What the repeats on the engine are apart, as such a share; an error below it is none.
    """

    name: str
    measured: float
    simulated: float
    error: float
    noise: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One load on the engine and in the simulator.

    Attributes:
        load: Its name.
        rate_per_s: Requests a second; None: all at once.
        measured: What clients of the engine saw in each repeat of the same requests.
        simulated: What those of the simulator saw, with another jitter each time.
        stage_slowdown: The time of the stages for what they computed in these repeats, over that
            for the same in the calibration: how much the machine itself has changed. Not an input
            of the simulation.
    """

    load: str
    rate_per_s: float | None
    measured: tuple[Figures, ...]
    simulated: tuple[Figures, ...]
    stage_slowdown: float

    @property
    def errors(self) -> list[FigureError]:
        """Of each figure."""
        return [_compare(field.name, self.measured, self.simulated) for field in fields(Figures)]


def _compare(name: str, measured: Sequence[Figures], simulated: Sequence[Figures]) -> FigureError:
    engine = [getattr(figures, name) for figures in measured]
    mean, simulator = fmean(engine), fmean(getattr(figures, name) for figures in simulated)
    return FigureError(
        name=name,
        measured=mean,
        simulated=simulator,
        error=simulator / mean - 1,
        noise=(max(engine) - min(engine)) / mean,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class FidelityResult:
    """The comparisons of one model.

    Attributes:
        provenance: Model, hardware, versions.
        costs: What a micro-batch costs beside the computing of its stages.
        client_s: How much longer clients wait for a first token than the scheduler takes.
        comparisons: By load; the first one is saturated.
    """

    provenance: str
    costs: ServiceCosts
    client_s: float
    comparisons: tuple[Comparison, ...]

    def to_json(self) -> dict[str, Any]:
        """All of it in JSON's types."""
        comparisons = [
            asdict(each) | {"errors": [asdict(error) for error in each.errors]}
            for each in self.comparisons
        ]
        return asdict(self) | {"comparisons": comparisons}

    def table(self) -> str:
        """A line for each load and figure, and one for what the machine changed."""
        lines = [
            f"{'load':<13}{'figure':<16}{'engine':>9}{'simulator':>11}{'error':>8}{'noise':>8}"
        ]
        for each in self.comparisons:
            for line in each.errors:
                numbers = f"{line.measured:>9.4g}{line.simulated:>11.4g}"
                shares = f"{line.error:>+8.1%}{line.noise:>8.1%}"
                lines.append(f"{each.load:<13}{line.name:<16}{numbers}{shares}")
            slowdown = f"{each.stage_slowdown - 1:>+8.1%}"
            lines.append(f"{each.load:<13}{'stages slower than when calibrated':<36}{slowdown}")
        return "\n".join(lines)


async def bench_fidelity(
    config: ServiceConfig,
    lengths: LengthsConfig,
    *,
    num_requests: int,
    num_repeats: int = 3,
    loads: Sequence[float] = (0.5, 0.85),
    seed: int = 0,
    on_step: OnStep,
) -> FidelityResult:
    """Send requests to the engine, learn its costs from some, and simulate the others.

    Each repeat is a calibration, of requests all at once and as a Poisson process, and then the
    requests to compare, at loads of their own. What is calibrated with has other arrivals and
    lengths each time; what is compared has the same. So nothing is fitted to what is compared.

    Args:
        config: What is served; Ray is connected to a cluster of this machine.
        lengths: Of prompts and outputs.
        num_requests: Of each load.
        num_repeats: Of everything.
        loads: Shares of the capacity, which is that of the first requests all at once.
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

    def workload(arrivals: ArrivalsConfig, seed: int) -> Workload:
        return Workload(
            SyntheticWorkloadConfig(arrivals=arrivals, lengths=lengths, num_requests=num_requests),
            seed,
        )

    on_step("starting the engine")
    service = await RecordedService.start(config)
    try:
        on_step("warm-up")
        await service.replay(workload(AtOnceArrivalsConfig(), seed + 1))
        calibrations: list[RecordedReplay] = []
        compared: defaultdict[str, list[RecordedReplay]] = defaultdict(list)
        for repeat in range(num_repeats):
            on_step(f"calibration {repeat + 1}")
            other = seed + 1 + repeat
            calibrations.append(await service.replay(workload(AtOnceArrivalsConfig(), other)))
            capacity_per_s = num_requests / calibrations[0].seen.wall_s
            poisson = PoissonArrivalsConfig(rate_per_s=_CALIBRATION_SHARE * capacity_per_s)
            calibrations.append(await service.replay(workload(poisson, other)))
            arrivals = _arrivals(loads, capacity_per_s)
            for load, each in arrivals.items():
                on_step(f"load {repeat + 1}: {load}")
                compared[load].append(await service.replay(workload(each, seed)))
    finally:
        await service.close()
    on_step("simulating")
    cost, costs = fit_service_costs(layout, [each.served for each in calibrations])
    client_s = fmean(each.client_s for each in calibrations[1::2])  # not those all at once
    deployment = Deployment(
        cost=cost,
        make_scheduler=lambda: build_scheduler(
            config,
            num_blocks=service.group.num_blocks,
            max_model_len=service.group.max_model_len,
        ),
        timing=costs.timing(layout.num_stages),
    )
    return FidelityResult(
        provenance=describe_service(config, service.group.infos),
        costs=costs,
        client_s=client_s,
        comparisons=tuple(
            Comparison(
                load=load,
                rate_per_s=getattr(each, "rate_per_s", None),
                measured=tuple(_measured_figures(one.seen) for one in compared[load]),
                simulated=tuple(
                    _simulated_figures(
                        Simulation(deployment, workload(each, seed), seed=repeat).run().report,
                        client_s,
                    )
                    for repeat in range(num_repeats)
                ),
                stage_slowdown=_stage_slowdown(cost, costs, compared[load]),
            )
            for load, each in arrivals.items()
        ),
    )


def _arrivals(loads: Sequence[float], capacity_per_s: float) -> dict[str, ArrivalsConfig]:
    """Those to compare, by name."""
    arrivals: dict[str, ArrivalsConfig] = {"all at once": AtOnceArrivalsConfig()}
    for share in loads:
        arrivals[f"{share:.0%}"] = PoissonArrivalsConfig(rate_per_s=share * capacity_per_s)
    return arrivals


def _stage_slowdown(
    cost: MeasuredCost, costs: ServiceCosts, replays: Sequence[RecordedReplay]
) -> float:
    """The stages' time for what they computed, over that which is predicted from its load."""
    served = [each for replay in replays for each in replay.served]
    num_stages = cost.layout.num_stages
    time_s = fsum(stage.end_s - stage.start_s for each in served for stage in each.stages)
    predicted_s = exp(costs.jitter**2 / 2) * fsum(
        cost.stage_time_s(stage_id, each.step.load)
        for each in served
        for stage_id in range(num_stages)
    )
    return (time_s + costs.step_s * num_stages * len(served)) / predicted_s


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
