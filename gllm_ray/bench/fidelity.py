"""`gllm-ray bench fidelity`: how far the simulator is from the engine that it simulates."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import exp, fsum
from statistics import fmean

from gllm_ray.assembly.engines import build_scheduler
from gllm_ray.bench.engine_load import prompt_vocab_size
from gllm_ray.bench.fidelity_report import Comparison, FidelityResult, Figures
from gllm_ray.bench.prompts import make_requests
from gllm_ray.bench.recorded_service import RecordedReplay, RecordedService
from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.service_costs import ServiceCosts, fit_service_costs
from gllm_ray.bench.service_profile import describe_service, service_layout
from gllm_ray.config import ServiceConfig
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.length_config import LengthsConfig
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.report import Report
from gllm_ray.simulation.simulator import Simulation
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
    make_workload = partial(_workload, lengths, num_requests)
    on_step("starting the engine")
    service = await RecordedService.start(config)
    replayer = _Replayer(service, prompt_vocab_size(config))
    try:
        replays = await _serve(replayer, make_workload, loads, num_repeats, seed, on_step)
    finally:
        await service.close()
    on_step("simulating")
    cost, costs = fit_service_costs(layout, [each.served for each in replays.calibrations])
    deployment = Deployment(
        cost=cost,
        make_scheduler=lambda: build_scheduler(
            config,
            num_blocks=service.group.num_blocks,
            max_model_len=service.group.max_model_len,
        ),
        timing=costs.timing(layout.num_stages),
    )

    def simulate(arrivals: ArrivalsConfig, repeat: int) -> Figures:
        simulation = Simulation(deployment, make_workload(arrivals, seed), seed=repeat)
        return _simulated_figures(simulation.run().report, replays.client_s)

    return FidelityResult(
        provenance=describe_service(config, service.group.infos),
        costs=costs,
        client_s=replays.client_s,
        comparisons=tuple(
            Comparison(
                load=load,
                rate_per_s=getattr(arrivals, "rate_per_s", None),
                measured=tuple(_measured_figures(each.seen) for each in replays.compared[load]),
                simulated=tuple(simulate(arrivals, repeat) for repeat in range(num_repeats)),
                stage_slowdown=_stage_slowdown(cost, costs, replays.compared[load]),
            )
            for load, arrivals in replays.arrivals.items()
        ),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Replays:
    """What was served.

    Attributes:
        arrivals: Those compared, by load.
        compared: All repeats of each load.
        calibrations: Replays that costs are learnt from.
        client_s: How much longer clients waited for a first token than the scheduler took, in those
            calibrations whose requests did not come all at once.
    """

    arrivals: dict[str, ArrivalsConfig]
    compared: dict[str, list[RecordedReplay]]
    calibrations: list[RecordedReplay]
    client_s: float


@dataclass(slots=True)
class _Replayer:
    """Replays workloads on a service, each with prompts that no other has."""

    service: RecordedService
    vocab_size: int
    num_replays: int = 0

    async def replay(self, workload: Workload) -> RecordedReplay:
        self.num_replays += 1
        seed = f"replay {self.num_replays}"
        return await self.service.replay(make_requests(workload, seed, vocab_size=self.vocab_size))


async def _serve(
    service: _Replayer,
    make_workload: Callable[[ArrivalsConfig, int], Workload],
    loads: Sequence[float],
    num_repeats: int,
    seed: int,
    on_step: OnStep,
) -> _Replays:
    at_once = AtOnceArrivalsConfig()
    on_step("warm-up")
    await service.replay(make_workload(at_once, seed + 1))
    on_step("capacity")
    saturated = [await service.replay(make_workload(at_once, seed + 1))]
    capacity_per_s = saturated[0].seen.requests_per_s
    poisson = PoissonArrivalsConfig(rate_per_s=_CALIBRATION_SHARE * capacity_per_s)
    arrivals: dict[str, ArrivalsConfig] = {"all at once": at_once}
    for share in loads:
        arrivals[f"{share:.0%}"] = PoissonArrivalsConfig(rate_per_s=share * capacity_per_s)
    steady: list[RecordedReplay] = []
    compared: dict[str, list[RecordedReplay]] = {load: [] for load in arrivals}
    for repeat in range(1, num_repeats + 1):
        on_step(f"repeat {repeat}: calibration")
        if repeat > 1:
            saturated.append(await service.replay(make_workload(at_once, seed + repeat)))
        steady.append(await service.replay(make_workload(poisson, seed + repeat)))
        for load, each in arrivals.items():
            on_step(f"repeat {repeat}: {load}")
            compared[load].append(await service.replay(make_workload(each, seed)))
    return _Replays(
        arrivals=arrivals,
        compared=compared,
        calibrations=steady + saturated,
        client_s=fmean(each.client_s for each in steady),
    )


def _workload(
    lengths: LengthsConfig, num_requests: int, arrivals: ArrivalsConfig, seed: int
) -> Workload:
    config = SyntheticWorkloadConfig(arrivals=arrivals, lengths=lengths, num_requests=num_requests)
    return Workload(config, seed)


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


def _measured_figures(seen: RequestFigures) -> Figures:
    return Figures(
        requests_per_s=seen.requests_per_s,
        ttft_p50_s=seen.ttft_s.p50,
        ttft_p99_s=seen.ttft_s.p99,
        tpot_p50_s=seen.tpot_s.p50,
        tpot_p99_s=seen.tpot_s.p99,
    )


def _simulated_figures(report: Report, client_s: float) -> Figures:
    return Figures(
        requests_per_s=report.requests_per_s,
        ttft_p50_s=report.ttft_s.p50 + client_s,
        ttft_p99_s=report.ttft_s.p99 + client_s,
        tpot_p50_s=report.tpot_s.p50,
        tpot_p99_s=report.tpot_s.p99,
    )
