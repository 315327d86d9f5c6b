"""`gllm-ray bench`: what measures, as commands."""

import argparse
import asyncio
import os
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

from gllm_ray.bench.fidelity_models import MODELS, fidelity_service
from gllm_ray.bench.large_simulations import LargeSimulation, bench_large_simulations
from gllm_ray.bench.measured_command import show_step
from gllm_ray.bench.pipeline_command import add_pipeline_benchmarks
from gllm_ray.bench.policies import bench_policies
from gllm_ray.bench.policy_runs import Effort
from gllm_ray.bench.policy_scenarios import SCENARIOS
from gllm_ray.bench.policy_table import policy_table
from gllm_ray.bench.random_checkpoint import SHAPES, write_random_checkpoint
from gllm_ray.bench.result_file import write_json
from gllm_ray.bench.scheduler import SchedulerBenchResult, bench_scheduler
from gllm_ray.bench.service_command import add_service_benchmarks
from gllm_ray.bench.simulator import SimulatorBenchResult, bench_simulator
from gllm_ray.errors import GllmRayError
from gllm_ray.option_types import DefaultsFormatter, not_negative, output_file, positive
from gllm_ray.policy_config import POLICY_CONFIGS
from gllm_ray.simulation.length_config import LengthsConfig

_REPRODUCTION = "reproduction"
# Short, so that a run takes minutes on a CPU.
_FIDELITY_LENGTHS = LengthsConfig.model_validate(
    {
        "prompt": {"name": "lognormal", "median_tokens": 64, "sigma": 0.6, "max_tokens": 256},
        "output": {"name": "lognormal", "median_tokens": 32, "sigma": 0.6, "max_tokens": 128},
    }
)


def add_bench_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add the benchmarks to the commands of a parser; each sets `run`."""
    bench = commands.add_parser("bench", help="measure a part of the service on this machine")
    benchmarks = bench.add_subparsers(dest="benchmark", required=True)
    add_service_benchmarks(benchmarks)
    add_pipeline_benchmarks(benchmarks)
    _add_scheduler(benchmarks)
    _add_fidelity(benchmarks)
    _add_policies(benchmarks)
    _add_simulator(benchmarks)
    _add_checkpoint(benchmarks)


def _add_scheduler(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "scheduler",
        help="processor time of the scheduler alone for a micro-batch",
        description=bench_scheduler.__doc__,
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--policy", choices=list(POLICY_CONFIGS), help="one alone instead of all")
    parser.add_argument("--stages", type=positive, default=16, help="depth of the pipeline")
    parser.add_argument("--running", type=positive, default=4096, help="sequences in decode")
    parser.add_argument("--waiting", type=not_negative, default=10_000, help="requests that wait")
    parser.add_argument("--steps", type=positive, default=4000, help="micro-batches to measure")
    parser.add_argument("--ring", action="store_true", help="as with `pipeline.ring: true`")
    parser.add_argument(
        "--output", type=output_file, help="write the numbers to this file, as JSON"
    )
    parser.set_defaults(run=_bench_scheduler)


def _bench_scheduler(options: argparse.Namespace) -> int:
    names = [options.policy] if options.policy else list(POLICY_CONFIGS)
    results = []
    print(SchedulerBenchResult.table_head(), flush=True)
    try:
        for name in names:
            result = bench_scheduler(
                POLICY_CONFIGS[name](),
                num_stages=options.stages,
                num_running=options.running,
                num_waiting=options.waiting,
                num_steps=options.steps,
                ring=options.ring,
            )
            print(result.table_row(), flush=True)
            results.append(result.as_json())
    except GllmRayError as error:
        print(f"--running={options.running}: too few: {error}", file=sys.stderr)
        return 1
    if options.output is not None:
        write_json(options.output, results)
    return 0


def _add_fidelity(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "fidelity",
        help="the simulator against the engine",
        description="Serve a model in two stages on the CPU of this machine, learn the costs of "
        "micro-batches from some requests, simulate others, and compare. Nothing else should run "
        "meanwhile.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--model", choices=MODELS, help="one alone instead of all")
    parser.add_argument("--requests", type=positive, default=60, help="of each load")
    parser.add_argument("--repeats", type=positive, default=3, help="of everything")
    parser.add_argument("--seed", type=int, default=0, help="of arrivals and lengths")
    parser.add_argument(
        "--output", type=output_file, help="write the numbers to this file, as JSON"
    )
    parser.set_defaults(run=_bench_fidelity)


def _bench_fidelity(options: argparse.Namespace) -> int:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from gllm_ray.bench.fidelity import bench_fidelity
    from gllm_ray.bench.machine import describe_machine

    machine, results = describe_machine("cpu"), {}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False)
    try:
        for model in [options.model] if options.model else MODELS:
            show_step(f"model: {model}")
            with tempfile.TemporaryDirectory() as directory:
                result = asyncio.run(
                    bench_fidelity(
                        fidelity_service(model, Path(directory)),
                        _FIDELITY_LENGTHS,
                        num_requests=options.requests,
                        num_repeats=options.repeats,
                        seed=options.seed,
                        on_step=show_step,
                    )
                )
            print(f"{result.provenance}\n{result.table()}\n", flush=True)
            results[model] = result.to_json()
    except GllmRayError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        ray.shutdown()
    if options.output is not None:
        write_json(options.output, {"machine": machine, "models": results})
        print(f"wrote {options.output}")
    return 0


def _add_policies(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "policies",
        help="every scheduling policy on the same simulated traffic",
        description="Simulate every policy at every load, offline and up to its SLO capacity.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="a quarter of the requests")
    parser.add_argument(
        "--only",
        default="",
        help=f"scenarios whose name holds this text; {_REPRODUCTION}: published comparisons alone",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="one run each")
    parser.add_argument("--processes", type=positive, help="at a time; default: one a processor")
    parser.add_argument(
        "--output",
        type=output_file,
        default=Path(__file__).parent / "results" / "policies.json",
        help="write the numbers to this file, as JSON, and beside it the table, as Markdown",
    )
    parser.set_defaults(run=_bench_policies)


def _bench_policies(options: argparse.Namespace) -> int:
    effort = Effort(seeds=tuple(options.seeds))
    if options.quick:
        effort = effort.quarter()
    scenarios = [scenario for scenario in SCENARIOS if options.only in scenario.name]
    with_reproduction = options.only in _REPRODUCTION
    if not scenarios and not with_reproduction:
        names = "; ".join([*(scenario.name for scenario in SCENARIOS), _REPRODUCTION])
        print(
            f"--only {options.only}: no scenario's name holds that; there are {names}",
            file=sys.stderr,
        )
        return 1

    def write(results: dict[str, Any]) -> None:
        write_json(options.output, results)
        options.output.with_suffix(".md").write_text(policy_table(results))
        done = [scenario["name"] for scenario in results["scenarios"]]
        print(f"wrote {options.output}: {'; '.join(done)}", file=sys.stderr, flush=True)

    results = bench_policies(
        scenarios,
        effort,
        options.processes,
        on_result=write,
        with_reproduction=with_reproduction,
    )
    write(results)
    print(policy_table(results), end="")
    return 0


def _add_simulator(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "simulator",
        help="output tokens simulated in a second of processor time",
        description=bench_simulator.__doc__,
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("--policy", choices=list(POLICY_CONFIGS), help="one alone instead of all")
    parser.add_argument(
        "--stages", type=positive, nargs="+", default=[4, 16], help="depths of the pipeline"
    )
    parser.add_argument("--running", type=positive, default=256, help="sequences that run at once")
    parser.add_argument("--requests", type=positive, default=3000, help="requests to simulate")
    parser.add_argument(
        "--large",
        action="store_true",
        help="64 stages and 1,000 replicas instead, with their peak memory, for `balanced` or "
        "the policy given; takes minutes",
    )
    parser.add_argument(
        "--output", type=output_file, help="write the numbers to this file, as JSON"
    )
    parser.set_defaults(run=_bench_simulator)


def _bench_simulator(options: argparse.Namespace) -> int:
    if options.large:
        return _bench_large_simulations(options)
    names = [options.policy] if options.policy else list(POLICY_CONFIGS)
    results = []
    print(SimulatorBenchResult.table_head(), flush=True)
    try:
        for name, num_stages in product(names, options.stages):
            result = bench_simulator(
                POLICY_CONFIGS[name](),
                num_stages=num_stages,
                num_running=options.running,
                num_requests=options.requests,
            )
            print(result.table_row(), flush=True)
            results.append(result.as_json())
    except GllmRayError as error:
        print(error, file=sys.stderr)
        return 1
    if options.output is not None:
        write_json(options.output, results)
    return 0


def _bench_large_simulations(options: argparse.Namespace) -> int:
    results = []
    print(LargeSimulation.table_head(), flush=True)
    for result in bench_large_simulations(POLICY_CONFIGS[options.policy or "balanced"]()):
        print(result.table_row(), flush=True)
        results.append(result.as_json())
    if options.output is not None:
        write_json(options.output, results)
    return 0


def _add_checkpoint(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "checkpoint",
        help="write a model of random weights that any engine can serve",
        description="Write a model of random weights, a tokenizer, and serve.yaml: two stages of "
        "the model on CPU, for `bench compare DIRECTORY/serve.yaml COMMAND`.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("shape", choices=list(SHAPES))
    parser.add_argument("directory", type=Path, metavar="DIRECTORY")
    parser.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights"
    )
    parser.set_defaults(run=_write_checkpoint)


def _write_checkpoint(options: argparse.Namespace) -> int:
    try:
        write_random_checkpoint(options.shape, options.directory, dtype=options.dtype)
    except OSError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"wrote {options.directory / 'serve.yaml'}")
    return 0
