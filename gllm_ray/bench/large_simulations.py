"""What large simulations take: a deep pipeline and many replicas, at two numbers of requests."""

import resource
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from time import process_time
from typing import Any

from gllm_ray.bench.simulator import saturable_deployment
from gllm_ray.policy_config import PolicyConfig
from gllm_ray.simulation.simulator import Simulation
from gllm_ray.simulation.workload import Workload
from gllm_ray.simulation.workload_config import SyntheticWorkloadConfig

_MAXRSS_BYTES = 1 if sys.platform == "darwin" else 1024  # the unit of `ru_maxrss`


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeCase:
    """A deployment under a load that it keeps up with, so that no queue grows.

    Attributes:
        num_stages: Depth of its pipelines.
        num_replicas: How many pipelines.
        rate_per_s: Requests a second, of all replicas.
        lengths: Of prompts and outputs, as a workload's configuration has them.
        nums_requests: Simulated one after the other; all are more than run at once.
    """

    num_stages: int
    num_replicas: int
    rate_per_s: float
    lengths: str | Mapping[str, Any]
    nums_requests: tuple[int, int]


LARGE_CASES = (
    LargeCase(
        num_stages=64,
        num_replicas=1,
        rate_per_s=8,
        lengths="sharegpt",
        nums_requests=(500, 2000),
    ),
    LargeCase(
        num_stages=4,
        num_replicas=1000,
        rate_per_s=2000,
        lengths={"prompt": 200, "output": 16},
        nums_requests=(4000, 16_000),
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class LargeSimulation:
    """What one simulation took.

    Attributes:
        num_stages: Depth of its pipelines.
        num_replicas: How many pipelines.
        num_requests: Requests simulated.
        num_output_tokens: Output tokens simulated.
        decodes_mean: Decodes of a micro-batch.
        processor_s: Processor time.
        peak_bytes: Most memory of its process, interpreter and modules included.
    """

    num_stages: int
    num_replicas: int
    num_requests: int
    num_output_tokens: int
    decodes_mean: float
    processor_s: float
    peak_bytes: int

    @property
    def tokens_per_s(self) -> float:
        """Output tokens simulated in a second of processor time."""
        return self.num_output_tokens / self.processor_s

    @staticmethod
    def table_head() -> str:
        """The first two lines of a Markdown table."""
        return (
            "| stages | replicas | requests | decodes in each micro-batch | output tokens "
            "| tokens/s | peak memory (ru_maxrss) |\n|---|---|---|---|---|---|---|"
        )

    def table_row(self) -> str:
        """The line of this simulation."""
        return (
            f"| {self.num_stages} | {self.num_replicas} | {self.num_requests} "
            f"| {self.decodes_mean:.1f} | {self.num_output_tokens} | {self.tokens_per_s:,.0f} "
            f"| {self.peak_bytes / 2**20:.0f} MiB |"
        )

    def as_json(self) -> dict[str, Any]:
        """For a file of results."""
        return asdict(self) | {"tokens_per_s": self.tokens_per_s}


def bench_large_simulations(
    policy: PolicyConfig, cases: tuple[LargeCase, ...] = LARGE_CASES
) -> Iterator[LargeSimulation]:
    """Run each case at both numbers of requests, each in a process of its own, one at a time."""
    # A spawned process would begin with the peak of the one that spawns it.
    context = get_context("forkserver")
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as pool:
        for case in cases:
            for num_requests in case.nums_requests:
                yield pool.submit(_simulate, policy, case, num_requests).result()


def _simulate(policy: PolicyConfig, case: LargeCase, num_requests: int) -> LargeSimulation:
    deployment = saturable_deployment(
        policy, num_stages=case.num_stages, num_replicas=case.num_replicas
    )
    config = SyntheticWorkloadConfig.model_validate(
        {"arrivals": case.rate_per_s, "lengths": case.lengths, "num_requests": num_requests}
    )
    start_s = process_time()
    report = Simulation(deployment, Workload(config, 0)).run().report
    return LargeSimulation(
        num_stages=case.num_stages,
        num_replicas=case.num_replicas,
        num_requests=sum(report.num_ended.values()),
        num_output_tokens=report.num_output_tokens,
        decodes_mean=report.batch_decodes.mean,
        processor_s=process_time() - start_s,
        peak_bytes=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _MAXRSS_BYTES,
    )
