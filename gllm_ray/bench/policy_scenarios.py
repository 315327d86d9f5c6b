"""What policies are compared on: traffic on pipelines, and the settings that compete."""

from dataclasses import dataclass, replace

from gllm_ray.bench.policy_hardware import Hardware, pipeline_cost
from gllm_ray.policy_config import (
    BalancedConfig,
    ChunkedPrefillConfig,
    PolicyConfig,
    PrefillFirstConfig,
    TemporalConfig,
    TokenThrottlingConfig,
)
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.length_config import Dataset, LengthsConfig

OURS = "balanced"
ONE_STAGE = "tensor parallel"
# What a decode-only step of the SLO holds, as Sarathi-Serve defines its strict SLO.
_SLO_DECODES, _SLO_CONTEXT = 32, 4096
_STRICT = 5
TTFT_LIMIT_S = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """A workload on hardware.

    Attributes:
        hardware: What serves.
        lengths: What prompts and outputs are like.
        rates_per_s: From light to more than any policy keeps up with.
    """

    hardware: Hardware
    lengths: Dataset | LengthsConfig
    rates_per_s: tuple[float, ...]

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


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """A setting on a scenario.

    Attributes:
        scenario: Its hardware is one stage where the devices work tensor-parallel.
        policy: What forms the micro-batches.
    """

    scenario: Scenario
    policy: PolicyConfig


def contenders(scenario: Scenario) -> dict[str, Contender]:
    """The settings that compete; `balanced` is one of them, with its defaults."""
    fixed = {
        f"chunked_prefill {budget}": ChunkedPrefillConfig(token_budget=budget)
        for budget in (256, 512, 1024, 2048)
    }
    policies: dict[str, PolicyConfig] = {
        OURS: BalancedConfig(),
        "token_throttling": TokenThrottlingConfig(),
        **fixed,
        "chunked_prefill dynamic": ChunkedPrefillConfig(
            token_budget=2048, tbt_target_s=tpot_limit_s(scenario.hardware)
        ),
        "prefill_first": PrefillFirstConfig(),
        "temporal": TemporalConfig(),
    }
    one_stage = replace(scenario, hardware=scenario.hardware.as_one_stage())
    return {
        name: Contender(scenario=scenario, policy=policy) for name, policy in policies.items()
    } | {
        f"{ONE_STAGE}, {name}": Contender(scenario=one_stage, policy=fixed[name])
        for name in ("chunked_prefill 512", "chunked_prefill 2048")
    }


def tpot_limit_s(hardware: Hardware) -> float:
    """The strict SLO: five times a step of 32 decodes of 4,096 tokens through all stages."""
    cost = pipeline_cost(hardware)
    step = StepLoad(num_decodes=_SLO_DECODES, num_context_tokens=_SLO_DECODES * _SLO_CONTEXT)
    return _STRICT * sum(cost.stage_time_s(stage, step) for stage in range(hardware.num_stages))


def slo_limits(scenario: Scenario) -> dict[str, float]:
    """The most that each measure may be under the SLO."""
    return {"ttft_p90_s": TTFT_LIMIT_S, "tpot_p99_s": tpot_limit_s(scenario.hardware)}
