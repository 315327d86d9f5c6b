"""Simulates the choices of a plan, in as many processes as there are to be."""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from math import ceil
from multiprocessing import get_context
from typing import Any, TypeVar

from gllm_ray.partition import size_kv_cache
from gllm_ray.scheduling import Scheduler, SchedulerSettings, make_policy
from gllm_ray.scheduling.learnt_cost_model import LearntCostModel
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.devices import Device, find_device
from gllm_ray.simulation.hosts import Host, find_host
from gllm_ray.simulation.links import Link, find_link
from gllm_ray.simulation.metrics import FINISHED
from gllm_ray.simulation.plan_config import PlanConfig
from gllm_ray.simulation.plan_demand import Demand
from gllm_ray.simulation.plan_ranking import Outcome, violations
from gllm_ray.simulation.planner import Choice, Cut, stage_infos, stages_per_node
from gllm_ray.simulation.report import Summary
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.simulator import Simulation, SimulationResult
from gllm_ray.simulation.virtual_pipeline import Timing, mixed_links, uniform_links
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import (
    StagedArrivalsConfig,
    SyntheticWorkloadConfig,
    TraceWorkloadConfig,
)

_MAX_HEADROOM = 16.0
_HEADROOM_HALVINGS = 3

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")


def make_cost(config: PlanConfig, cut: Cut) -> RooflineCost:
    """The time of each stage of a replica.

    Raises:
        ConfigError: A device, host or link is not known.
    """
    return RooflineCost(
        cut.layout(config.model.shape()),
        find_device(cut.device),
        find_host(config.host),
        _shard_link(config, cut),
    )


def cost_parts(config: PlanConfig, cut: Cut) -> list[Device | Host | Link]:
    """What has constants that the times of a replica depend on.

    Raises:
        ConfigError: A device, host or link is not known.
    """
    shard_link = _shard_link(config, cut)
    shard_links = [] if shard_link is None else [shard_link]
    return [find_device(cut.device), find_host(config.host), *_links(config, cut), *shard_links]


def screen(config: PlanConfig, choice: Choice) -> Outcome:
    """Simulate one replica with its share of the requests."""
    return _simulate(config, choice, share=choice.num_replicas)


def evaluate(config: PlanConfig, choice: Choice) -> Outcome:
    """Simulate all replicas with all requests."""
    return _simulate(config, choice)


def headroom(config: PlanConfig, choice: Choice) -> float:
    """The highest multiple of the workload's rate that meets the SLO, to an eighth of its octave.

    It is at least 1 and at most 16; for choices that meet the SLO at 1. Drawn requests come for as
    long at any rate; a trace is over sooner.
    """
    low, high = 1.0, 2.0
    while high <= _MAX_HEADROOM and _meets(config, choice, high):
        low, high = high, 2 * high
    if high > _MAX_HEADROOM:
        return low
    for _ in range(_HEADROOM_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if _meets(config, choice, middle) else (low, middle)
    return low


def in_processes(
    function: Callable[[PlanConfig, ItemT], ResultT],
    config: PlanConfig,
    items: Sequence[ItemT],
    *,
    num_processes: int,
    on_progress: Callable[[int, int], None],
) -> list[ResultT]:
    """Call a function of this module for every item; the results are in the order of the items.

    Args:
        function: What to call.
        config: Its first argument.
        items: Its second argument, one by one.
        num_processes: How many at once; 1: in this process.
        on_progress: Told how many of how many are done.
    """
    call = partial(function, config)
    if num_processes == 1 or len(items) < 2:
        return list(_counted(map(call, items), len(items), on_progress))
    context = get_context("spawn")
    with ProcessPoolExecutor(min(num_processes, len(items)), mp_context=context) as pool:
        futures = [pool.submit(call, item) for item in items]
        for _ in _counted(as_completed(futures), len(items), on_progress):
            pass
        return [future.result() for future in futures]


def _counted(
    results: Iterable[ResultT], total: int, on_progress: Callable[[int, int], None]
) -> Iterable[ResultT]:
    for num_done, result in enumerate(results, 1):
        on_progress(num_done, total)
        yield result


def _meets(config: PlanConfig, choice: Choice, rate: float) -> bool:
    return not violations(config, _simulate(config, choice, rate=rate))


def _simulate(config: PlanConfig, choice: Choice, *, share: int = 1, rate: float = 1.0) -> Outcome:
    """Simulate a choice at a multiple of the rate; with a share, one of every `share` replicas."""
    deployment = _deployment(config, choice, choice.num_replicas // share)
    workload_config = _at_rate(config.workload, rate)
    workload = Workload(workload_config, config.seed, share=share)
    result = Simulation(deployment, workload, seed=config.seed).run()
    demand = Demand.of(Workload(workload_config, config.seed), workload_config)
    return _outcome(config, choice, result, demand)


def _at_rate(
    workload: SyntheticWorkloadConfig | TraceWorkloadConfig, rate: float
) -> SyntheticWorkloadConfig | TraceWorkloadConfig:
    """`rate` times the requests in the same time."""
    num_requests = workload.num_requests and ceil(workload.num_requests * rate)
    changes: dict[str, Any] = {"num_requests": num_requests}
    if isinstance(arrivals := workload.arrivals, StagedArrivalsConfig):
        changes["arrivals"] = arrivals.at_rate(rate)  # in stages as long as before
    else:
        changes["rate_scale"] = workload.rate_scale * rate
    return workload.model_copy(update=changes)


def _deployment(config: PlanConfig, choice: Choice, num_replicas: int) -> Deployment:
    cut = choice.cut
    infos = stage_infos(config, config.model.shape(), cut)
    settings = SchedulerSettings(
        num_stages=cut.num_stages,
        num_blocks=size_kv_cache(infos, config.block_size, config.model.max_model_len),
        block_size=config.block_size,
        max_model_len=config.model.max_model_len,
        max_decodes=config.max_decodes,
    )

    def make_scheduler() -> Scheduler:
        # As in a service without a calibration: it learns stage times while it serves.
        policy = make_policy(choice.policy)
        return Scheduler(policy, settings, cost=LearntCostModel(), predictor=StatisticsPredictor())

    return Deployment(
        cost=make_cost(config, cut),
        make_scheduler=make_scheduler,
        timing=Timing(
            links=_links(config, cut), schedule_s=config.schedule_s, result_s=config.result_s
        ),
        num_replicas=num_replicas,
        routing=config.routing,
    )


def _shard_link(config: PlanConfig, cut: Cut) -> Link | None:
    name = config.gpu(cut.device).link
    return None if name is None or cut.tensor_parallel == 1 else find_link(name)


def _links(config: PlanConfig, cut: Cut) -> tuple[Link, ...]:
    gpu = config.gpu(cut.device)
    if cut.num_stages == 1 or gpu.link is None:
        return ()
    link = find_link(gpu.link)
    per_node = stages_per_node(gpu, cut.num_stages, cut.tensor_parallel)
    if config.network is None or len(per_node) == 1:
        return uniform_links(link, cut.num_stages)
    return mixed_links(link, find_link(config.network), per_node)


def _outcome(
    config: PlanConfig, choice: Choice, result: SimulationResult, demand: Demand
) -> Outcome:
    report = result.report

    def percentile(summary: Summary) -> float:
        return {50: summary.p50, 90: summary.p90, 99: summary.p99}[config.slo.percentile]

    ended = report.num_ended
    num_finished = sum(ended[reason] for reason in FINISHED)
    served_ratio = num_finished / sum(ended.values())
    demand_per_s = demand.served_per_s(result.requests.admitted_s, report.wall_s)
    return Outcome(
        choice=choice,
        latency_s={
            "ttft": percentile(report.ttft_s),
            "tpot": percentile(report.tpot_s),
            "e2e": percentile(report.e2e_s),
        },
        output_tokens_per_s=served_ratio * demand_per_s,
        num_requests=sum(ended.values()),
        num_unfinished=sum(ended.values()) - num_finished,
        utilization=report.pipeline.utilization,
        first_error=result.requests.first_error,
    )
