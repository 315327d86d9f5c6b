"""The scoreboard as Markdown: first what leads and what does not, then what was measured."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from gllm_ray.bench.markdown import markdown_table
from gllm_ray.bench.policy_goals import (
    COMPARABLE,
    LEAST_CAPACITY,
    LEAST_IDEAL,
    LEAST_OFFLINE,
    LEAST_THROUGHPUT,
    LEAST_UTILIZATION,
    MOST_LATENCY,
    FrontierGoal,
    Results,
    capacity_goal,
    fixed_goal,
    frontier_goals,
    geometric_mean,
    offline_goal,
    one_stage_comparison,
    runs_at,
    slo_capacities,
)
from gllm_ray.bench.policy_reproduction import TOLERANCE
from gllm_ray.bench.policy_scenarios import OURS
from gllm_ray.bench.reproduction_table import reproduction_table
from gllm_ray.bench.sarathi_capacity import SARATHI_TOLERANCE


def policy_table(results: Mapping[str, Any]) -> str:
    """The verdicts, the tables of all scenarios, and the reproduction."""
    scenarios, reproduction = results["scenarios"], results["reproduction"]
    parts = [
        "# Scheduling policies on the same simulated traffic",
        _effort(results),
        *([_summary(scenarios)] if scenarios else []),
        *([_reproduction_summary(reproduction)] if reproduction else []),
    ]
    if scenarios:
        parts += ["## SLO capacity", _capacities(scenarios), "## Loads"]
        parts += map(_scenario, scenarios)
    if reproduction:
        parts += ["## Reproduction", reproduction_table(reproduction)]
    return "\n\n".join(parts) + "\n"


def _effort(results: Mapping[str, Any]) -> str:
    seeds = ", ".join(map(str, results["seeds"]))
    return (
        f"Means of seeds {seeds}. At each rate, requests come for {results['duration_s']:g} s, at "
        f"most {results['max_requests']} of them; an offline batch is {results['num_offline']} at "
        f"once. Commit {results['commit'] or 'unknown'}."
    )


def _summary(scenarios: Sequence[Results]) -> str:
    """One line of verdicts for each scenario."""
    over_all = fixed_goal(scenarios)
    head = ["", "(a) SLO capacity", "(b) loads", "(c) saturated", "(d) offline", "one stage"]
    return (
        f"`{OURS}` with its defaults, divided by the best other setting of each cell:\n\n"
        f"{markdown_table(head, [_summary_row(scenario) for scenario in scenarios])}\n\n"
        f"Over all scenarios its SLO capacity is {over_all.ratio:.3f} x that of the best single "
        f"setting, {over_all.best}; an ideal pipeline's would be {over_all.bound_ratio:.3f} x "
        f"(geometric means; goal {LEAST_CAPACITY}: "
        f"{_verdict(over_all.ratio >= LEAST_CAPACITY)}).\n\n"
        "- (a) Goal: the highest SLO capacity, a ratio of at least 1. The bound is that of an "
        "ideal pipeline, without a bubble and at the best tile. No schedule keeps up with more for "
        "long, so no capacity counts for more.\n"
        f"- (b) Goal: at every load at least {LEAST_THROUGHPUT} x the highest throughput, and at "
        f"most {MOST_LATENCY} x the lowest p90 TTFT and the lowest p99 TPOT, which may be two "
        f"settings', among those with at least {COMPARABLE} x its throughput. Given are the loads "
        "that meet it, those on the frontier (none of these settings has both latencies as low), "
        "and the worst ratios.\n"
        f"- (c) Goal: in the offline batch, a utilization of {LEAST_UTILIZATION} and "
        f"{LEAST_IDEAL} of the ideal pipeline's throughput. The bound is what filling the pipeline "
        "and the longest request leave of that.\n"
        f"- (d) Goal: in the offline batch, {LEAST_OFFLINE} x the throughput of the best other "
        "setting. The bound is the ratio that no schedule exceeds.\n"
        "- One stage: SLO capacity and offline throughput, divided by those of the same devices "
        "used tensor-parallel. That is another deployment, not another schedule of this one, and "
        "counts in no goal."
    )


def _summary_row(scenario: Results) -> list[str]:
    capacity, loads = capacity_goal(scenario), frontier_goals(scenario)
    offline, one_stage = offline_goal(scenario), one_stage_comparison(scenario)
    num_met, num_on_frontier = (
        sum(load.is_met for load in loads),
        sum(load.is_on_frontier for load in loads),
    )
    throughput, ttft, tpot = (
        min(load.throughput for load in loads),
        max(load.ttft for load in loads),
        max(load.tpot for load in loads),
    )
    goal_a = f"{capacity.ratio:.2f} of {capacity.best}, bound {capacity.bound_ratio:.2f}"
    goal_b = (
        f"{num_met} of {len(loads)}, on the frontier {num_on_frontier}; {throughput:.3f}, "
        f"TTFT {ttft:.2f}, TPOT {tpot:.2f}"
    )
    goal_c = (
        f"{offline.utilization:.3f}; {offline.ideal_ratio:.3f}, bound {offline.ideal_bound:.3f}"
    )
    goal_d = f"{offline.ratio:.3f} of {offline.best}, bound {offline.bound_ratio:.3f}"
    return [
        scenario["name"],
        f"{goal_a}: {_verdict(capacity.ratio >= 1)}",
        f"{goal_b}: {_verdict(num_met == len(loads))}",
        f"{goal_c}: {_verdict(offline.is_saturated)}",
        f"{goal_d}: {_verdict(offline.ratio >= LEAST_OFFLINE)}",
        f"{one_stage.capacity:.2f}; {one_stage.offline:.2f}",
    ]


def _reproduction_summary(rows: Sequence[Results]) -> str:
    counts = Counter(row["verdict"] for row in rows)
    said = ", ".join(f"{count} {name}" for name, count in counts.most_common())
    return (
        f"Of {len(rows)} published comparisons: {said}. Reproduced is a ratio within "
        f"{100 * TOLERANCE:.0f} % of what was published, within {100 * SARATHI_TOLERANCE:.0f} % "
        "for Sarathi-Serve's capacities, or above 1 where no more was published."
    )


def _capacities(scenarios: Sequence[Results]) -> str:
    found = list(map(slo_capacities, scenarios))
    rows = []
    for name in found[0]:
        capacities = [each[name] for each in found]
        mean = geometric_mean(capacities)
        rows.append([name, *(f"{capacity:.2f}" for capacity in (*capacities, mean))])
    bounds = [scenario["bounds"]["max_rate_per_s"] for scenario in scenarios]
    rows.append(["*ideal pipeline*", *(f"{bound:.2f}" for bound in bounds), ""])
    head = ["requests/s", *(scenario["name"] for scenario in scenarios), "geometric mean"]
    limits = ", ".join(f"{1000 * scenario['tpot_limit_s']:.0f}" for scenario in scenarios)
    nominal = dict.fromkeys(name for scenario in scenarios for name in scenario["nominal"])
    return (
        "The highest rate at which p90 TTFT is at most 2 s, and p99 TPOT at most 5 decode-only "
        f"steps of 32 sequences of 4,096 tokens: {limits} ms.\n\n{markdown_table(head, rows)}\n\n"
        f"Nominal constants, not fitted to measurements: {', '.join(nominal) or 'none'}."
    )


def _scenario(scenario: Results) -> str:
    rates = list(dict.fromkeys(run["rate_per_s"] for run in scenario["runs"]))
    columns = [runs_at(scenario, rate) for rate in rates]
    heads = ["offline" if rate is None else f"{rate:g}/s" for rate in rates]
    rows = [[name, *(_cell(column[name]) for column in columns)] for name in columns[0]]
    lines = [
        f"**{scenario['name']}**: tokens/s, p90 and p99 TTFT s, p99 TPOT ms, utilization",
        markdown_table(["policy", *heads], rows),
        f"{OURS} divided by the best, in throughput, p90 TTFT, p99 TPOT: "
        + "; ".join(map(_frontier, frontier_goals(scenario)))
        + ".",
    ]
    return "\n\n".join(lines)


def _cell(run: Results) -> str:
    return (
        f"{run['tokens_per_s']:.0f}, {run['ttft_p90_s']:.2f} {run['ttft_p99_s']:.2f}, "
        f"{1000 * run['tpot_p99_s']:.0f}, {run['utilization']:.2f}"
    )


def _frontier(goal: FrontierGoal) -> str:
    return (
        f"{goal.rate_per_s:g}/s {goal.throughput:.3f}, {goal.ttft:.2f}, {goal.tpot:.2f} "
        f"{_verdict(goal.is_met)}"
    )


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "**missed**"
