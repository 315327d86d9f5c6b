"""The scoreboard as Markdown: what was measured, and how far `balanced` is from leading."""

from collections.abc import Mapping
from math import prod
from typing import Any

from gllm_ray.bench.policies import OURS

Scenario = Mapping[str, Any]
# What leading means: least share of the best, and how near in throughput others count.
_LEAST_THROUGHPUT, _MOST_LATENCY, _COMPARABLE = 0.99, 1.05, 0.97
_LEAST_CAPACITY, _LEAST_OFFLINE = 1.15, 1.03
_LEAST_UTILIZATION, _LEAST_IDEAL = 0.97, 0.95


def policy_table(results: Mapping[str, Any]) -> str:
    """The tables of all scenarios, the verdicts and the reproduction."""
    seeds = ", ".join(map(str, results["seeds"]))
    effort = (
        f"Seeds {seeds}; requests come for {results['duration_s']:g} s at each rate, and "
        f"{results['num_offline']} at once offline; commit {results['commit'] or 'unknown'}."
    )
    parts = [
        effort,
        _capacity(results["scenarios"]),
        *map(_scenario, results["scenarios"]),
        _reproduction(results["reproduction"]),
    ]
    return "\n\n".join(parts) + "\n"


def _capacity(scenarios: list[Scenario]) -> str:
    names = list(scenarios[0]["slo_capacity_per_s"])

    def capacities_of(name: str) -> list[float]:
        return [each["slo_capacity_per_s"][name] for each in scenarios]

    means = {name: prod(capacities_of(name)) ** (1 / len(scenarios)) for name in names}
    best = max((name for name in names if name != OURS), key=means.__getitem__)
    rows = [
        [name, *(f"{capacity:.2f}" for capacity in (*capacities_of(name), means[name]))]
        for name in names
    ]
    ratio = means[OURS] / means[best] if means[best] else float("inf")
    tuned = ", ".join(f"{_tuned_ratio(each):.2f}" for each in scenarios)
    return (
        "**(a) SLO capacity**, requests/s at p90 TTFT <= 2 s and p99 TPOT <= 5 decode steps\n\n"
        + _markdown(["policy", *(each["name"] for each in scenarios), "geometric mean"], rows)
        + f"\n\n{OURS} is {ratio:.3f} x the best fixed setting, {best} "
        f"(goal {_LEAST_CAPACITY}: {_verdict(ratio >= _LEAST_CAPACITY)}); "
        f"{tuned} x the best of each workload (goal 1)."
    )


def _tuned_ratio(scenario: Scenario) -> float:
    capacity = scenario["slo_capacity_per_s"]
    best: float = max(value for name, value in capacity.items() if name != OURS)
    return capacity[OURS] / best if best else float("inf")


def _scenario(scenario: Scenario) -> str:
    runs = scenario["runs"]
    rates = list(dict.fromkeys(run["rate_per_s"] for run in runs))
    names = list(dict.fromkeys(run["policy"] for run in runs))
    of = {(run["policy"], run["rate_per_s"]): run for run in runs}
    heads = ["offline" if rate is None else f"{rate:g}/s" for rate in rates]
    table = _markdown(
        ["policy", *heads], [[name, *(_cell(of[name, rate]) for rate in rates)] for name in names]
    )
    lines = [
        f"**{scenario['name']}**: tokens/s, p90 TTFT s, p99 TPOT ms, utilization",
        table,
        "(b) " + "; ".join(_frontier(of, names, rate) for rate in rates if rate is not None) + ".",
        _saturated(of, names),
    ]
    return "\n\n".join(lines)


def _cell(run: Mapping[str, float]) -> str:
    return (
        f"{run['tokens_per_s']:.0f}, {run['ttft_p90_s']:.2f}, {1000 * run['tpot_p99_s']:.0f}, "
        f"{run['utilization']:.2f}"
    )


def _frontier(of: Mapping[Any, Mapping[str, float]], names: list[str], rate: float) -> str:
    """How far ours is from the best in each measure at a rate, as ratios to the best."""
    ours, others = of[OURS, rate], [of[name, rate] for name in names if name != OURS]
    tokens_per_s = ours["tokens_per_s"]
    throughput = tokens_per_s / max(run["tokens_per_s"] for run in others)
    near = [run for run in others if run["tokens_per_s"] >= _COMPARABLE * tokens_per_s]

    def latency_ratio(measure: str) -> float:
        return max((ours[measure] / run[measure] for run in near), default=0.0)

    ttft, tpot = latency_ratio("ttft_p90_s"), latency_ratio("tpot_p99_s")
    is_met = throughput >= _LEAST_THROUGHPUT and max(ttft, tpot) <= _MOST_LATENCY
    return (
        f"{rate:g}/s throughput {throughput:.3f}, TTFT {ttft:.2f}, TPOT {tpot:.2f} x the best: "
        f"{_verdict(is_met)}"
    )


def _saturated(of: Mapping[Any, Mapping[str, float]], names: list[str]) -> str:
    ours = of[OURS, None]
    best = max((n for n in names if n != OURS), key=lambda name: of[name, None]["tokens_per_s"])
    ratio = ours["tokens_per_s"] / of[best, None]["tokens_per_s"]
    utilization, ideal = ours["utilization"], ours["ideal_ratio"]
    is_saturated = utilization >= _LEAST_UTILIZATION and ideal >= _LEAST_IDEAL
    # Nothing is faster than the work at the best tile without a bubble, filling and drain included.
    return (
        f"(c) offline utilization {utilization:.3f} (goal {_LEAST_UTILIZATION}) and {ideal:.3f} of "
        f"the ideal (goal {_LEAST_IDEAL}): {_verdict(is_saturated)}. (d) offline {ratio:.3f} x the "
        f"best other, {best} (goal {_LEAST_OFFLINE}): {_verdict(ratio >= _LEAST_OFFLINE)}; no "
        f"bubble and the best tile would bound it at {ratio / ideal:.3f} x."
    )


def _reproduction(pairs: list[Mapping[str, Any]]) -> str:
    rows = []
    for pair in pairs:
        first, second = pair["first"], pair["second"]
        ours = (
            f"throughput {first['tokens_per_s']:.0f} against {second['tokens_per_s']:.0f} tokens/s "
            f"({first['tokens_per_s'] / second['tokens_per_s']:.2f} x), "
            f"E2E {first['e2e_mean_s'] / second['e2e_mean_s']:.2f} x, "
            f"utilization {first['utilization']:.2f} against {second['utilization']:.2f}, "
            f"preemptions {first['num_preemptions']:.0f} against {second['num_preemptions']:.0f}"
        )
        rows.append([pair["what"], pair["published"], ours])
    return "**Reproduction**\n\n" + _markdown(["L20 x 4", "published", "here"], rows)


def _verdict(is_met: bool) -> str:
    return "met" if is_met else "missed"


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
