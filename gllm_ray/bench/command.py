"""`gllm-ray bench`: the benchmarks as commands."""

import argparse
import json
from pathlib import Path
from typing import Any

from gllm_ray.bench.scheduler import SchedulerBenchResult, bench_scheduler
from gllm_ray.bench.simulator import SimulatorBenchResult, bench_simulator
from gllm_ray.policy_config import POLICY_CONFIGS


def add_bench_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add the benchmarks to the commands of a parser; each sets `run`."""
    bench = commands.add_parser("bench", help="measure a part of the service on this machine")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    _add_scheduler(benchmarks)
    _add_simulator(benchmarks)


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


def _add_simulator(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "simulator",
        help="output tokens simulated in a second of processor time",
        description=bench_simulator.__doc__,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--policy", choices=list(POLICY_CONFIGS), help="one alone instead of all")
    parser.add_argument(
        "--stages", type=int, nargs="+", default=[4, 16], help="depths of the pipeline"
    )
    parser.add_argument("--running", type=int, default=256, help="sequences that run at once")
    parser.add_argument("--requests", type=int, default=3000, help="requests to simulate")
    parser.add_argument("--output", type=Path, help="write the numbers to this file, as JSON")
    parser.set_defaults(run=_bench_simulator)


def _bench_simulator(options: argparse.Namespace) -> int:
    names = [options.policy] if options.policy else list(POLICY_CONFIGS)
    results = []
    print(SimulatorBenchResult.table_head(), flush=True)
    for name in names:
        for num_stages in options.stages:
            result = bench_simulator(
                POLICY_CONFIGS[name](),
                num_stages=num_stages,
                num_running=options.running,
                num_requests=options.requests,
            )
            print(result.table_row(), flush=True)
            results.append(result.as_json())
    if options.output is not None:
        options.output.write_text(json.dumps(results, indent=2) + "\n")
    return 0
