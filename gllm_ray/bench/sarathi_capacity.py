"""Capacities under the SLOs of Sarathi-Serve's evaluation, of its policy and of prefill first."""

from concurrent.futures import Executor
from dataclasses import dataclass, replace
from math import inf
from statistics import fmean
from typing import Any

from gllm_ray.bench.policy_runs import Effort
from gllm_ray.bench.policy_scenarios import Contender, Scenario
from gllm_ray.bench.sarathi_setups import MAX_QUEUE_S, SETUPS, Setup
from gllm_ray.bench.slo_capacity import Search, slo_capacity
from gllm_ray.bench.verdict import verdict
from gllm_ray.policy_config import ChunkedPrefillConfig, PolicyConfig, PrefillFirstConfig
from gllm_ray.simulation.length_config import Dataset

# A run of the paper ends after 2,048 requests or half an hour.
_DURATION_S = 1800.0
_REQUESTS_RATIO = 16  # of a run of the scoreboard to one of these
SARATHI_TOLERANCE = 0.5
_LENGTHS: tuple[Dataset, ...] = ("sharegpt_8k", "arxiv_summarization")
_SLOS = ("strict", "relaxed")
# vLLM prefills whole prompts, however long a sequence may be.
_PREFILL_FIRST = PrefillFirstConfig(token_budget=16_384)
_PREFILL_FIRST_SHARE = 0.4  # of the capacity of Sarathi-Serve, to begin with


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """One capacity.

    Attributes:
        setup: Model, hardware and SLOs.
        lengths: Of the requests.
        slo: `strict` or `relaxed`.
        is_chunked: Whether prefill is chunked, or goes first.
        effort: Of each search.
    """

    setup: Setup
    lengths: Dataset
    slo: str
    is_chunked: bool
    effort: Effort


def sarathi_rows(effort: Effort, pool: Executor) -> list[dict[str, Any]]:
    """The ratio of the two capacities in each cell, in JSON's types."""
    effort = replace(
        effort,
        duration_s=_DURATION_S,
        max_requests=max(1, effort.max_requests // _REQUESTS_RATIO),
    )
    pairs = [(setup, lengths, slo) for setup in SETUPS for lengths in _LENGTHS for slo in _SLOS]
    cells = [
        Cell(setup=setup, lengths=lengths, slo=slo, is_chunked=is_chunked, effort=effort)
        for setup, lengths, slo in pairs
        for is_chunked in (True, False)
    ]
    found = pool.map(capacity, cells)
    return [_row(*pair, (next(found), next(found))) for pair in pairs]


def capacity(cell: Cell) -> float:
    """The mean over the seeds; the search of each begins where the one before ended."""
    setup, index = cell.setup, _SLOS.index(cell.slo)
    policy: PolicyConfig = _PREFILL_FIRST
    start_per_s = setup.start_per_s * _PREFILL_FIRST_SHARE
    if cell.is_chunked:
        policy = ChunkedPrefillConfig(token_budget=setup.budgets[index])
        start_per_s = setup.start_per_s
    scenario = Scenario(
        hardware=setup.hardware, lengths=cell.lengths, rates_per_s=(setup.start_per_s,)
    )
    capacities: list[float] = []
    for seed in cell.effort.seeds:
        search = Search(
            contender=Contender(scenario=scenario, policy=policy),
            effort=cell.effort,
            seed=seed,
            limits={"queue_p50_s": MAX_QUEUE_S, "itl_p99_s": setup.limits_s[index]},
            start_per_s=capacities[-1] if capacities and capacities[-1] else start_per_s,
            least_per_s=setup.start_per_s / 50,
        )
        capacities.append(slo_capacity(search))
    return fmean(capacities)


def _row(
    setup: Setup, lengths: Dataset, slo: str, capacities: tuple[float, float]
) -> dict[str, Any]:
    published = setup.published.get((lengths, slo))
    chunked, prefill_first = capacities
    ours = chunked / prefill_first if prefill_first else inf
    said = verdict(published or (1.0, inf), ours, SARATHI_TOLERANCE)
    return {
        "what": f"Sarathi / vLLM, {setup.hardware.name}, {lengths}, {slo} SLO",
        "source": "Sarathi-Serve, OSDI '24",
        "measure": "capacity_per_s",
        "published": published and list(published),
        "ours": ours if prefill_first else None,
        "runs": [{"capacity_per_s": each} for each in capacities],
        "verdict": said,
        "why": "" if said == "reproduced" else _WHY,
    }


_WHY = (
    "a capacity under a p99 is knife-edge: it flips where prefill reaches 1 % of the tokens; "
    "attention and links of these devices are partly nominal"
)
