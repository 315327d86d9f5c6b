"""The set-ups of Sarathi-Serve's evaluation, and the capacities it reports for them."""

from dataclasses import dataclass

from gllm_ray.bench.policy_hardware import Hardware
from gllm_ray.simulation.length_config import Dataset

MAX_QUEUE_S = 2.0  # the median time until a request is first scheduled
_MAX_DECODES = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """A model and its SLOs.

    Attributes:
        hardware: Serves it.
        budgets: Of Sarathi-Serve under the strict and the relaxed SLO.
        limits_s: p99 time between tokens under the strict and the relaxed SLO.
        start_per_s: Where the search for a capacity begins, requests a second.
        published: Capacity of Sarathi-Serve over that of vLLM, lowest and highest of what is
            printed, by lengths and SLO; it leads where no number is given.
    """

    hardware: Hardware
    budgets: tuple[int, int]
    limits_s: tuple[float, float]
    start_per_s: float
    published: dict[tuple[Dataset, str], tuple[float, float]]


# Source: Agrawal et al., "Sarathi-Serve", OSDI '24 (arXiv:2403.02310), section 5 and figures 10 to
# 13, and its artifact (branch osdi-sarathi-serve at ceaa066): SLOs, budgets, batches of 128. The
# host is fitted to decodes of that prototype.
SETUPS = (
    Setup(
        hardware=Hardware(
            name="Mistral-7B, A100",
            model="Mistral-7B",
            device="A100-80GB-PCIe",
            links=("a100-nvlink-pairs", "100gbe-nc96"),
            stages_per_node=(1,),
            host="sarathi-serve",
            max_decodes=_MAX_DECODES,
        ),
        budgets=(512, 2048),
        limits_s=(0.1, 0.5),
        start_per_s=1.0,
        published={
            ("sharegpt_8k", "strict"): (2.15, 3.5),
            ("arxiv_summarization", "strict"): (1.97, 1.97),
        },
    ),
    Setup(
        hardware=Hardware(
            name="Yi-34B, 2 A100, TP2",
            model="Yi-34B",
            device="A100-80GB-PCIe",
            links=("a100-nvlink-pairs", "100gbe-nc96"),
            stages_per_node=(1,),
            tensor_parallel=2,
            shard_link="a100-nvlink-pairs",
            host="sarathi-serve",
            max_decodes=_MAX_DECODES,
        ),
        budgets=(512, 2048),
        limits_s=(0.2, 1.0),
        start_per_s=0.5,
        published={
            ("sharegpt_8k", "strict"): (2.44, 3.7),
            ("sharegpt_8k", "relaxed"): (1.65, 1.65),
        },
    ),
    Setup(
        hardware=Hardware(
            name="LLaMA2-70B, 8 A40, TP4-PP2",
            model="LLaMA2-70B",
            device="A40",
            links=("a40-pcie", "a40-inter-node"),
            stages_per_node=(2,),
            tensor_parallel=4,
            shard_link="a40-pcie",
            host="sarathi-serve",
            max_decodes=_MAX_DECODES,
        ),
        budgets=(512, 1536),
        limits_s=(1.0, 5.0),
        start_per_s=0.3,
        published={("sharegpt_8k", "strict"): (4.3, 4.3)},
    ),
    Setup(
        hardware=Hardware(
            name="Falcon-180B, 2 x 4 A100, TP4-PP2",
            model="Falcon-180B",
            device="A100-80GB-PCIe",
            links=("a100-nvlink-pairs", "100gbe-nc96"),
            stages_per_node=(1, 1),
            tensor_parallel=4,
            shard_link="a100-nvlink-pairs",
            host="sarathi-serve",
            max_decodes=_MAX_DECODES,
        ),
        budgets=(512, 2048),
        limits_s=(1.0, 5.0),
        start_per_s=0.4,
        published={
            ("sharegpt_8k", "strict"): (3.6, 5.6),
            ("sharegpt_8k", "relaxed"): (1.48, 1.48),
        },
    ),
)
