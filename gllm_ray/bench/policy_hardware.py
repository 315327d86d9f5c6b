"""The pipelines that policies are compared on: models on devices, what they cost and hold."""

import json
from dataclasses import dataclass, replace
from functools import cache
from importlib.resources import files

from gllm_ray.policy_config import PolicyConfig
from gllm_ray.scheduling import Scheduler, SchedulerSettings, make_policy
from gllm_ray.scheduling.calibrated_cost_model import CalibratedCostModel
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_fit import fit_scheduler_cost
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hardware import names_of_uncalibrated
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.links import find_link
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.virtual_pipeline import Timing, mixed_links

_BLOCK_SIZE = 16
_MAX_MODEL_LEN = 16_384
_MEMORY_UTILIZATION = 0.9
_RESULT_S = 5e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A model on a pipeline of equal devices.

    Attributes:
        name: What tables call it.
        model: A name in `policy_models.json`, which holds what shapes of config.json files need.
        device: Every one of them.
        links: Between stages inside a node and between nodes.
        stages_per_node: The stages of each node, in order.
        profile: A file of measured prefills in this folder; None: the roofline of the device.
        tensor_parallel: Devices of each stage.
        shard_link: Connects the devices of a stage; None: there is but one.
        host: The process of each stage, where there is no profile.
        max_decodes: Of a micro-batch.
        num_blocks: KV blocks; None: what the devices hold.
        schedule_s: The scheduler's time for a micro-batch.
    """

    name: str
    model: str
    device: str
    links: tuple[str, str]
    stages_per_node: tuple[int, ...]
    profile: str | None = None
    tensor_parallel: int = 1
    shard_link: str | None = None
    host: str = "graphs"
    max_decodes: int = 512
    num_blocks: int | None = None
    schedule_s: float = 1e-3

    @property
    def num_stages(self) -> int:
        """Depth of the pipeline."""
        return sum(self.stages_per_node)

    def as_one_stage(self) -> "Hardware":
        """The same devices, all of which compute each layer together.

        All-reduces are rings over the slowest link. Where the pipeline has a measured profile, this
        has the roofline of the device, whose constants are fitted to that profile and meet it with
        a mean error of 1.9 %: the profile says nothing of a shard.
        """
        return replace(
            self,
            stages_per_node=(1,),
            profile=None,
            tensor_parallel=self.num_stages * self.tensor_parallel,
            shard_link=self.links[len(self.stages_per_node) > 1],
        )


@cache
def pipeline_cost(hardware: Hardware) -> PipelineCost:
    """What micro-batches cost the stages."""
    shape = parse_model_shape(json.loads(_read("policy_models.json"))[hardware.model])
    layout = PipelineLayout.split(shape, hardware.num_stages, hardware.tensor_parallel)
    device = find_device(hardware.device)
    if hardware.profile is None:
        link = None if hardware.shard_link is None else find_link(hardware.shard_link)
        return RooflineCost(layout, device, find_host(hardware.host), link)
    prefills_ms = json.loads(_read(hardware.profile))["prefill_ms"]
    points = [(rows, time_ms / 1000) for rows, time_ms in prefills_ms]
    return MeasuredCost.from_prefills(layout, points, device)


def nominal_parts(hardware: Hardware) -> list[str]:
    """The names of the parts whose constants nobody has fitted to measurements."""
    host = [find_host(hardware.host)] if hardware.profile is None else []
    return names_of_uncalibrated([find_device(hardware.device), *host, *_timing(hardware).links])


def round_trip_s(hardware: Hardware, step: StepLoad) -> float:
    """The least time from forming a micro-batch to having its result."""
    cost, timing = pipeline_cost(hardware), _timing(hardware)
    num_bytes = cost.layout.hop_bytes(step)
    stages_s = sum(cost.stage_time_s(stage, step) for stage in range(hardware.num_stages))
    hops_s = sum(link.transfer_time_s(num_bytes) for link in timing.links)
    return timing.schedule_s + stages_s + hops_s + timing.result_s


def deployment(hardware: Hardware, policy: PolicyConfig) -> Deployment:
    """One replica whose scheduler has the fit of a profile, as a calibration file gives it.

    It learns output lengths as it serves.
    """
    cost = pipeline_cost(hardware)
    settings = SchedulerSettings(
        num_stages=hardware.num_stages,
        num_blocks=hardware.num_blocks or _num_blocks(hardware, cost.layout),
        block_size=_BLOCK_SIZE,
        max_model_len=_MAX_MODEL_LEN,
        max_decodes=hardware.max_decodes,
    )
    fit = _calibration(hardware)

    def make_scheduler() -> Scheduler:
        return Scheduler(make_policy(policy), settings, cost=fit, predictor=StatisticsPredictor())

    return Deployment(cost=cost, make_scheduler=make_scheduler, timing=_timing(hardware))


def _timing(hardware: Hardware) -> Timing:
    intra, inter = map(find_link, hardware.links)
    return Timing(
        links=mixed_links(intra, inter, hardware.stages_per_node),
        schedule_s=hardware.schedule_s,
        result_s=_RESULT_S,
    )


@cache
def _calibration(hardware: Hardware) -> CalibratedCostModel:
    return fit_scheduler_cost(pipeline_cost(hardware), f"a profile of {hardware.name}")


def _num_blocks(hardware: Hardware, layout: PipelineLayout) -> int:
    device = find_device(hardware.device)
    infos = layout.stage_infos(
        device_name=device.name,
        memory_bytes=device.memory_bytes,
        memory_utilization=_MEMORY_UTILIZATION,
        block_size=_BLOCK_SIZE,
    )
    return min(info.max_kv_blocks for info in infos)


def _read(name: str) -> str:
    return files(__package__).joinpath(name).read_text(encoding="utf-8")
