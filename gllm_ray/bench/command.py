"""`gllm-ray bench`: the benchmarks as commands."""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from gllm_ray.bench.policies import Effort, bench_policies
from gllm_ray.bench.policy_scenarios import SCENARIOS
from gllm_ray.bench.policy_table import policy_table
from gllm_ray.bench.scheduler import SchedulerBenchResult, bench_scheduler
from gllm_ray.policy_config import POLICY_CONFIGS


def add_bench_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add the benchmarks to the commands of a parser; each sets `run`."""
    bench = commands.add_parser("bench", help="measure a part of the service on this machine")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    _add_scheduler(benchmarks)
    _add_policies(benchmarks)


def _add_scheduler(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "scheduler",
        help="processor time of the scheduler alone for a micro-batch",
        description=bench_scheduler.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--policy", choices=list(POLICY_CONFIGS), help="one alone instead of all")
    parser.add_argument("--stages", type=int, default=16, help="depth of the pipeline")
    parser.add_argument("--running", type=int, default=4096, help="sequences in decode")
    parser.add_argument("--waiting", type=int, default=10_000, help="requests that wait")
    parser.add_argument("--steps", type=int, default=4000, help="micro-batches to measure")
    parser.add_argument("--output", type=Path, help="write the numbers to this file, as JSON")
    parser.set_defaults(run=_bench_scheduler)


def _bench_scheduler(options: argparse.Namespace) -> int:
    names = [options.policy] if options.policy else list(POLICY_CONFIGS)
    results = []
    print(SchedulerBenchResult.table_head(), flush=True)
    for name in names:
        result = bench_scheduler(
            POLICY_CONFIGS[name](),
            num_stages=options.stages,
            num_running=options.running,
            num_waiting=options.waiting,
            num_steps=options.steps,
        )
        print(result.table_row(), flush=True)
        results.append(result.as_json())
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0


def _add_policies(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "policies",
        help="every scheduling policy on the same simulated traffic",
        description="Simulate every policy at every load, offline and up to its SLO capacity.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    parser.add_argument("--only", default="", help="scenarios whose name holds this text")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--processes", type=int, help="at a time; default: one a processor")
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent / "results" / "policies.json",
        help="write the numbers to this file, as JSON, and beside it the table, as Markdown",
    )
    parser.set_defaults(run=_bench_policies)


def _bench_policies(options: argparse.Namespace) -> int:
    full, share = Effort(seeds=tuple(options.seeds)), 4 if options.quick else 1
    results = bench_policies(
        [scenario for scenario in SCENARIOS if options.only in scenario.name],
        replace(full, duration_s=full.duration_s / share, num_offline=full.num_offline // share),
        options.processes,
        progress=lambda name: print(f"done: {name}", file=sys.stderr, flush=True),
    )
    table = policy_table(results)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(results, indent=1) + "\n")
    options.output.with_suffix(".md").write_text(table)
    print(table, end="")
    return 0
