"""A plan as text: what fits, what does not, the frontier, and the best choice."""

from collections.abc import Sequence
from dataclasses import dataclass

from gllm_ray.partition import size_kv_cache
from gllm_ray.policy_config import PolicyConfig
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.hardware import words_for_uncalibrated
from gllm_ray.simulation.plan_config import PlanConfig
from gllm_ray.simulation.plan_evaluation import cost_parts, make_cost
from gllm_ray.simulation.plan_ranking import Outcome, cost, violations
from gllm_ray.simulation.planner import (
    Choice,
    Cut,
    Rejection,
    is_servable,
    stage_activations,
    stage_infos,
)

_CHUNK_TOKENS = 512
_MAX_DROPPED = 10
_MEMORY_HEAD = (
    "stage",
    "layers",
    "weights",
    "activations",
    "KV block",
    "KV blocks",
    "512-token chunk",
)
_LEGEND = (
    "busy: share of the time in which stages compute; headroom: up to how many times the rate the "
    "SLO is met, at most 16; output tokens/s: those of the workload over the time in which its "
    "requests come, or in which a choice that does not keep up with them takes them up"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What the search found.

    Attributes:
        outcomes: The choices that were simulated with all their replicas, the best first.
        dropped: Those that were only screened, by one replica, the best first.
        frontier: Those of them that no other dominates, by rising cost.
        best: The best one that the service runs and that meets the SLO; None: there is none.
        headroom: By choice, the multiple of the rate up to which it meets the SLO.
    """

    outcomes: tuple[Outcome, ...]
    dropped: tuple[Outcome, ...]
    frontier: tuple[Outcome, ...]
    best: Outcome | None
    headroom: dict[Choice, float]


def memory_table(config: PlanConfig, cuts: Sequence[Cut]) -> str:
    """What each stage of each cut holds, which bounds the KV cache, and which is the slowest.

    The numbers are those the engine prints when it starts, but that it measures the activations.
    """
    model = config.model.shape()
    load = StepLoad(num_prefill_tokens=_CHUNK_TOKENS, num_attention_pairs=_CHUNK_TOKENS**2)
    lines = []
    for cut in cuts:
        infos, stage_cost = stage_infos(config, model, cut), make_cost(config, cut)
        activations = stage_activations(config, model, cut)
        num_blocks = size_kv_cache(infos, config.block_size, config.model.max_model_len)
        times_s = [stage_cost.stage_time_s(info.stage_id, load) for info in infos]
        rows = [[*_MEMORY_HEAD, ""]]
        for info, time_s, num_bytes in zip(infos, times_s, activations, strict=True):
            notes = ["bounds the KV cache"] if info.max_kv_blocks == num_blocks else []
            notes += ["slowest"] if cut.num_stages > 1 and time_s == max(times_s) else []
            rows.append(
                [
                    str(info.stage_id),
                    f"{info.first_layer}-{info.last_layer - 1}",
                    f"{info.weight_bytes / 2**20:.1f} MiB",
                    f"~{num_bytes / 2**20:.0f} MiB",
                    f"{info.kv_block_bytes / 2**10:.1f} KiB",
                    str(info.max_kv_blocks),
                    f"{1000 * time_s:.2f} ms",
                    ", ".join(notes),
                ]
            )
        tokens = num_blocks * config.block_size
        head = f"{cut}, layers {list(cut.layers)}: {num_blocks} KV blocks, {tokens} tokens"
        lines += [head, *_aligned(rows), ""]
    return "\n".join(lines).rstrip()


def format_rejections(rejections: Sequence[Rejection]) -> str:
    """What was not simulated, and why."""
    return "\n".join(f"{rejection.what}: {rejection.reason}" for rejection in rejections)


def format_plan(config: PlanConfig, plan: Plan) -> str:
    """The frontier, the best simulated choices, and the one to take."""
    percentile = config.slo.percentile
    title = f"{_cost_name(config)} against p{percentile} {config.frontier.upper()}"
    return "\n".join(
        [
            f"Frontier: {title}",
            *_outcome_table(config, plan, plan.frontier),
            "",
            "The best that were simulated with all replicas",
            *_outcome_table(config, plan, plan.outcomes),
            "",
            *_dropped(config, plan),
            _LEGEND,
            "",
            *_verdict(config, plan),
        ]
    )


def _dropped(config: PlanConfig, plan: Plan) -> list[str]:
    if not plan.dropped:
        return []
    shown = plan.dropped[:_MAX_DROPPED]
    count = f"{len(shown)} of {len(plan.dropped)}"
    return [
        f"Not among the best when one replica served its share of the requests ({count})",
        *_outcome_table(config, plan, shown),
        "",
    ]


def _outcome_table(config: PlanConfig, plan: Plan, outcomes: Sequence[Outcome]) -> list[str]:
    percentile = f"p{config.slo.percentile}"
    has_layers = len(config.search.layers) > 1
    rows = [
        ["GPUs", "device", "stages", *["layers"] * has_layers, "TP", "replicas", "policy"]
        + [_cost_name(config)]
        + [f"{percentile} {name} (s)" for name in ("TTFT", "TPOT", "E2E")]
        + ["output tokens/s", "busy", "headroom", "SLO"]
    ]
    for outcome in outcomes:
        choice, latency = outcome.choice, outcome.latency_s
        multiple = plan.headroom.get(choice)
        rows.append(
            [
                str(choice.num_gpus),
                choice.cut.device,
                str(choice.cut.num_stages),
                *[str(list(choice.cut.layers))] * has_layers,
                str(choice.cut.tensor_parallel),
                str(choice.num_replicas),
                _policy_name(choice.policy),
                f"{cost(config, outcome):.3f}" if config.is_priced else str(choice.num_gpus),
                *(f"{latency[name]:.3f}" for name in ("ttft", "tpot", "e2e")),
                f"{outcome.output_tokens_per_s:.1f}",
                f"{outcome.utilization:.1%}",
                "" if multiple is None else f"{multiple:.3g} x",
                "; ".join(violations(config, outcome)) or "met",
            ]
        )
    return _aligned(rows)


def _verdict(config: PlanConfig, plan: Plan) -> list[str]:
    first, lines = plan.outcomes[0], []
    if plan.best is not None:
        lines.append(f"Best: {_name(plan.best.choice)}")
    else:
        servable = (outcome for outcome in plan.outcomes if is_servable(outcome.choice))
        nearest = next(servable, first)
        lines.append("No choice that the service runs meets the SLO; the nearest one:")
        lines.append(f"{_name(nearest.choice)}: {_misses(config, nearest)}")
    if not is_servable(first.choice) and not violations(config, first):
        lines.append(f"Better, but the service has no tensor parallelism: {_name(first.choice)}")
    parts = (part for outcome in plan.outcomes for part in cost_parts(config, outcome.choice.cut))
    if names := words_for_uncalibrated(parts):
        lines.append(f"Nominal constants, not fitted to measurements: {', '.join(names)}")
    return lines


def _misses(config: PlanConfig, outcome: Outcome) -> str:
    missed = "; ".join(violations(config, outcome)) or "meets it, but is not served"
    return f"{missed}, the first because {outcome.first_error}" if outcome.first_error else missed


def _name(choice: Choice) -> str:
    return (
        f"{choice.num_replicas} x ({choice.cut}), layers {list(choice.cut.layers)}, "
        f"{_policy_name(choice.policy)}"
    )


def _policy_name(policy: PolicyConfig) -> str:
    """The name, and the options that are not its defaults."""
    changed = policy.model_dump(exclude_defaults=True, exclude={"name"})
    return " ".join([policy.name, *(f"{key}={value}" for key, value in changed.items())])


def _cost_name(config: PlanConfig) -> str:
    return "cost/1M output tokens" if config.is_priced else "number of GPUs"


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
