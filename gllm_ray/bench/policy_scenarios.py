"""What policies are compared on: pipelines, workloads, and the settings that compete."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    PolicyConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.scheduling import Scheduler, SchedulerSettings, make_policy
from gllm_ray.scheduling.cost_model import FixedCostModel
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.length_config import Dataset
from gllm_ray.simulation.linear_fit import linear_fit
from gllm_ray.simulation.links import find_link
from gllm_ray.simulation.measured import MeasuredCost
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.virtual_pipeline import Timing, mixed_links

_BLOCK_SIZE = 16
_MAX_MODEL_LEN = 16_384
_MAX_DECODES = 512
_MEMORY_UTILIZATION = 0.9
_SCHEDULE_S, _RESULT_S = 1e-3, 5e-4
# What a decode-only step of the SLO holds, as Sarathi-Serve defines its strict SLO.
_SLO_DECODES, _SLO_CONTEXT = 32, 4096
_STRICT = 5

_MODELS: Mapping[str, Mapping[str, Any]] = {
    "Qwen2.5-32B": {
        "architectures": ["Qwen2ForCausalLM"],
        "model_type": "qwen2",
        "hidden_size": 5120,
        "intermediate_size": 27648,
        "num_hidden_layers": 64,
        "num_attention_heads": 40,
        "num_key_value_heads": 8,
        "vocab_size": 152064,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "max_position_embeddings": 32768,
    },
    "Llama-3.1-70B": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
        "max_position_embeddings": 131072,
    },
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A model on a pipeline of one device a stage.

    Attributes:
        name: What tables call it.
        model: One of the shapes above.
        device: Of every stage.
        links: Inside a node and between nodes.
        stages_per_node: The stages of each node, in order.
        profile: A file of measured prefills in this folder; None: the roofline of the device.
    """

    name: str
    model: str
    device: str
    links: tuple[str, str]
    stages_per_node: tuple[int, ...]
    profile: str | None = None

    @property
    def num_stages(self) -> int:
        """Depth of the pipeline."""
        return sum(self.stages_per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A workload on hardware.

    Attributes:
        hardware: What serves.
        lengths: What prompts and outputs are like.
        rates_per_s: From light to more than any policy keeps up with.
        num_blocks: KV blocks; None: what the devices hold.
    """

    hardware: Hardware
    lengths: Dataset
    rates_per_s: tuple[float, ...]
    num_blocks: int | None = None

    @property
    def name(self) -> str:
        """What tables call it."""
        return f"{self.hardware.name}, {self.lengths}"


_L20 = Hardware(
    name="L20 x 4, Qwen2.5-32B",
    model="Qwen2.5-32B",
    device="L20",
    links=("pcie-4-x16", "pcie-4-x16"),
    stages_per_node=(4,),
    profile="l20_qwen2.5_32b.json",
)
_A100 = Hardware(
    name="A100 x 4, Llama-3.1-70B",
    model="Llama-3.1-70B",
    device="A100-80GB-SXM",
    links=("a100-nvswitch", "a100-nvswitch"),
    stages_per_node=(4,),
)
_H100 = Hardware(
    name="H100 x 8 on 2 nodes, Llama-3.1-70B",
    model="Llama-3.1-70B",
    device="H100-80GB-SXM",
    links=("h100-nvswitch", "100gbe"),
    stages_per_node=(4, 4),
)
SCENARIOS = (
    Scenario(hardware=_L20, lengths="sharegpt", rates_per_s=(2, 4, 8, 12, 16)),
    Scenario(hardware=_L20, lengths="azure_conversation", rates_per_s=(0.5, 1, 2, 3, 4)),
    Scenario(hardware=_A100, lengths="sharegpt", rates_per_s=(2, 4, 8, 12, 16)),
    Scenario(hardware=_A100, lengths="azure_conversation", rates_per_s=(0.5, 1, 2, 3, 4)),
    Scenario(hardware=_H100, lengths="sharegpt", rates_per_s=(8, 16, 32, 48, 64)),
    Scenario(hardware=_H100, lengths="azure_conversation", rates_per_s=(2, 4, 8, 12, 16)),
)


def candidates(tbt_target_s: float) -> dict[str, PolicyConfig]:
    """The settings that compete; `balanced` is one of them, with its defaults."""
    fixed = {
        f"chunked_prefill {budget}": ChunkedPrefillConfig(token_budget=budget)
        for budget in (256, 512, 1024, 2048)
    }
    dynamic = ChunkedPrefillConfig(token_budget=2048, tbt_target_s=tbt_target_s)
    return {
        "balanced": BalancedConfig(),
        "token_throttling": TokenThrottlingConfig(),
        **fixed,
        "chunked_prefill dynamic": dynamic,
        "temporal": TemporalConfig(),
    }


@cache
def pipeline_cost(hardware: Hardware) -> PipelineCost:
    """What micro-batches cost the stages."""
    shape = parse_model_shape(dict(_MODELS[hardware.model]))
    layout = PipelineLayout.split(shape, hardware.num_stages)
    device = find_device(hardware.device)
    if hardware.profile is None:
        return RooflineCost(layout, device, find_host("graphs"))
    text = files(__package__).joinpath(hardware.profile).read_text(encoding="utf-8")
    points = [(rows, time_ms / 1000) for rows, time_ms in json.loads(text)["prefill_ms"]]
    return MeasuredCost.from_prefills(layout, points, device)


def tpot_limit_s(hardware: Hardware) -> float:
    """The strict SLO: five times a step of 32 decodes of 4,096 tokens through all stages."""
    cost = pipeline_cost(hardware)
    step = StepLoad(num_decodes=_SLO_DECODES, num_context_tokens=_SLO_DECODES * _SLO_CONTEXT)
    return _STRICT * sum(cost.stage_time_s(stage, step) for stage in range(hardware.num_stages))


def deployment(scenario: Scenario, policy: PolicyConfig) -> Deployment:
    """One replica whose scheduler has the linear fit of a profile, as a calibration file gives it.

    It learns output lengths as it serves.
    """
    hardware = scenario.hardware
    cost = pipeline_cost(hardware)
    settings = SchedulerSettings(
        num_stages=hardware.num_stages,
        num_blocks=scenario.num_blocks or _num_blocks(hardware, cost.layout),
        block_size=_BLOCK_SIZE,
        max_model_len=_MAX_MODEL_LEN,
        max_in_flight=hardware.num_stages,
        max_decodes=_MAX_DECODES,
    )
    fit = _calibration(hardware)

    def make_scheduler() -> Scheduler:
        return Scheduler(make_policy(policy), settings, cost=fit, predictor=StatisticsPredictor())

    intra, inter = map(find_link, hardware.links)
    timing = Timing(
        links=mixed_links(intra, inter, hardware.stages_per_node),
        schedule_s=_SCHEDULE_S,
        result_s=_RESULT_S,
    )
    return Deployment(cost=cost, make_scheduler=make_scheduler, timing=timing)


@cache
def _calibration(hardware: Hardware) -> FixedCostModel:
    fit = linear_fit(pipeline_cost(hardware))
    return FixedCostModel.from_calibration(fit | {"provenance": f"a profile of {hardware.name}"})


def _num_blocks(hardware: Hardware, layout: PipelineLayout) -> int:
    device = find_device(hardware.device)
    infos = layout.stage_infos(
        device_name=device.name,
        memory_bytes=device.memory_bytes,
        memory_utilization=_MEMORY_UTILIZATION,
        block_size=_BLOCK_SIZE,
    )
    return min(info.max_kv_blocks for info in infos)
