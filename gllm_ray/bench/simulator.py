"""How fast the simulator is: output tokens it simulates in a second of processor time."""

from dataclasses import asdict, dataclass
from time import process_time
from typing import Any

from gllm_ray.garbage import relax_garbage_collector
from gllm_ray.policy_config import PolicyConfig
from gllm_ray.scheduling import Scheduler, SchedulerSettings, make_policy
from gllm_ray.scheduling.length_predictor import StatisticsPredictor
from gllm_ray.simulation.cost_fit import fit_scheduler_cost
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.hosts import find_host
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.roofline import RooflineCost
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.virtual_pipeline import Timing
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import SyntheticWorkloadConfig

_BLOCK_SIZE = 16
_MAX_MODEL_LEN = 16_384
# What a running sequence of the ShareGPT lengths holds, about.
_HELD_TOKENS = 560
_TIMING = Timing(schedule_s=1e-3, result_s=5e-4)
_MODEL = {  # Qwen2.5-32B
    "model_type": "qwen2",
    "hidden_size": 5120,
    "intermediate_size": 27648,
    "num_hidden_layers": 64,
    "num_attention_heads": 40,
    "num_key_value_heads": 8,
    "vocab_size": 152064,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatorBenchResult:
    """The speed of the simulator for one policy and depth.

    Attributes:
        policy: Its name.
        num_stages: Depth of the pipeline.
        num_micro_batches: Micro-batches simulated.
        num_output_tokens: Output tokens simulated.
        decodes_mean: Decodes of a micro-batch; times the stages, about what runs at once.
        processor_s: Processor time.
        speedup: Simulated time over processor time.
    """

    policy: str
    num_stages: int
    num_micro_batches: int
    num_output_tokens: int
    decodes_mean: float
    processor_s: float
    speedup: float

    @property
    def tokens_per_s(self) -> float:
        """Output tokens simulated in a second of processor time."""
        return self.num_output_tokens / self.processor_s

    @staticmethod
    def table_head() -> str:
        """The first two lines of a Markdown table."""
        return (
            "| policy | stages | micro-batches | decodes in each | output tokens | tokens/s "
            "| times real time |\n|---|---|---|---|---|---|---|"
        )

    def table_row(self) -> str:
        """The line of this policy and depth."""
        return (
            f"| {self.policy} | {self.num_stages} | {self.num_micro_batches} "
            f"| {self.decodes_mean:.0f} | {self.num_output_tokens} | {self.tokens_per_s:,.0f} "
            f"| {self.speedup:,.0f} |"
        )

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}


def saturable_deployment(
    policy: PolicyConfig, *, num_stages: int, num_running: int = 256, num_replicas: int = 1
) -> Deployment:
    """Pipelines of L20 whose KV caches have room for about `num_running` ShareGPT sequences."""
    layout = PipelineLayout.split(parse_model_shape(_MODEL), num_stages)
    cost = RooflineCost(layout, find_device("L20"), find_host("graphs"))
    fit = fit_scheduler_cost(cost, "fit to the roofline")
    scheduler = SchedulerSettings(
        num_stages=num_stages,
        num_blocks=num_running * _HELD_TOKENS // _BLOCK_SIZE,
        block_size=_BLOCK_SIZE,
        max_model_len=_MAX_MODEL_LEN,
        max_decodes=num_running,
    )
    return Deployment(
        cost=cost,
        make_scheduler=lambda: Scheduler(
            make_policy(policy), scheduler, cost=fit, predictor=StatisticsPredictor()
        ),
        timing=_TIMING,
        num_replicas=num_replicas,
    )


def bench_simulator(
    policy: PolicyConfig, *, num_stages: int = 4, num_running: int = 256, num_requests: int = 3000
) -> SimulatorBenchResult:
    """Simulate an offline batch of ShareGPT lengths on a saturated pipeline of L20.

    The KV cache has room for about `num_running` sequences, and the others wait.
    """
    deployment = saturable_deployment(policy, num_stages=num_stages, num_running=num_running)
    config = SyntheticWorkloadConfig.model_validate(
        {"arrivals": "at_once", "lengths": "sharegpt", "num_requests": num_requests}
    )
    simulation = Simulation(deployment, list(Workload(config, 0)))
    relax_garbage_collector()
    start_s = process_time()
    report = simulation.run().report
    processor_s = process_time() - start_s
    return SimulatorBenchResult(
        policy=policy.name,
        num_stages=num_stages,
        num_micro_batches=report.num_micro_batches,
        num_output_tokens=report.num_output_tokens,
        decodes_mean=report.batch_decodes.mean,
        processor_s=processor_s,
        speedup=report.wall_s / processor_s,
    )
