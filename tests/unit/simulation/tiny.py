"""A small deployment whose times are easy to work out by hand."""

from collections.abc import Callable
from dataclasses import dataclass

from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.scheduling import Scheduler
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.attention_cost import NO_WINDOW, AttentionCost
from gllm_ray.simulation.deployment import Deployment
from gllm_ray.simulation.links import Link
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.simulated_request import SimulatedRequest
from gllm_ray.simulation.simulator import Simulation, SimulationResult
from tests.factories import make_scheduler

SHAPE = parse_model_shape(
    {
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 64,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
)
TOKEN_BYTES = 64 * 2  # of one row of hidden states


@dataclass(frozen=True, slots=True)
class LinearCost:
    """Every stage takes a constant, and a time for each row and for each token of context."""

    layout: PipelineLayout
    floor_s: float = 1.0
    token_s: float = 0.0
    context_token_s: float = 0.0
    pair_s: float = 0.0

    def stage_time_s(self, stage_id: int, load: StepLoad) -> float:
        return (
            self.floor_s
            + self.token_s * load.num_tokens
            + self.context_token_s * load.num_context_tokens
            + self.pair_s * load.num_attention_pairs
        )

    def attention(self, stage_id: int) -> list[AttentionCost]:
        return [AttentionCost(NO_WINDOW, self.context_token_s, self.pair_s)]


def linear_cost(num_stages: int, floor_s: float = 1.0, **times_s: float) -> LinearCost:
    return LinearCost(PipelineLayout.split(SHAPE, num_stages), floor_s, **times_s)


def link(latency_s: float, bandwidth_bytes_s: float) -> Link:
    return Link(
        name="made up",
        latency_s=latency_s,
        bandwidth_bytes_s=bandwidth_bytes_s,
        is_calibrated=False,
        provenance="made up",
    )


def serial_scheduler(num_stages: int, **options) -> Callable[[], Scheduler]:
    """Makes schedulers that put 16 tokens into a micro-batch, decodes first."""
    options = {
        "policy": ChunkedPrefillConfig(token_budget=16),
        "num_blocks": 4096,
        "max_model_len": 4096,
    } | options
    return lambda: make_scheduler(num_stages=num_stages, **options)


def deployment(num_stages: int = 1, *, cost=None, make=None, **options) -> Deployment:
    return Deployment(
        cost=cost or linear_cost(num_stages),
        make_scheduler=make or serial_scheduler(num_stages),
        **options,
    )


def request(arrival_s: float = 0.0, prompt: int = 16, output: int = 1, **options):
    return SimulatedRequest(
        arrival_s=arrival_s, num_prompt_tokens=prompt, num_output_tokens=output, **options
    )


def simulate(deployed: Deployment, requests, **options) -> SimulationResult:
    return Simulation(deployed, requests, **options).run()
