"""The benchmarks of services over HTTP, as commands of `gllm-ray bench`."""

import argparse
import asyncio
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.bench.load_options import (
    add_http_options,
    add_load_options,
    add_metrics_option,
    add_output_options,
    load_tokenizer,
    parse_load,
    target_options,
)
from gllm_ray.bench.measured_command import measure_and_report, show_step
from gllm_ray.errors import ConfigError
from gllm_ray.option_types import positive

if TYPE_CHECKING:
    from gllm_ray.bench.result_file import Result

_TARGET = (
    "an address of what runs already, a Serve configuration in .yaml, or a command line with "
    "{port}, and maybe {model}, in it"
)


def add_service_benchmarks(benchmarks: Any) -> None:  # noqa: ANN401 - argparse names no type
    """Add the benchmarks of services, and the tables of all; each sets `run`."""
    _add_serve(benchmarks)
    _add_compare(benchmarks)
    _add_table(benchmarks)


# Each of the functions that run imports what it needs, so that other commands start without torch.


def _add_serve(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "serve",
        help="a service over HTTP",
        description="Send requests to a service that speaks OpenAI's API, and measure what clients "
        "see.",
    )
    parser.add_argument("target", metavar="SERVICE", help=_TARGET)
    parser.add_argument(
        "--model",
        help="for {model}, and which one of several models that the service lists (default: the "
        "first), or where it lists none",
    )
    parser.add_argument(
        "--pid", type=_process_id, help="of what runs already here, to tell its CPU time"
    )
    add_load_options(parser)
    add_http_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        from gllm_ray.bench.serve_bench import bench_serve

        target = target_options(options, model=options.model, pid=options.pid)
        tokenizer = load_tokenizer(options.tokenizer)
        return asyncio.run(bench_serve(options.target, target, parse_load(options), tokenizer))

    return measure_and_report(options, measure)


def _add_compare(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "compare",
        help="two services in turns, A B A B",
        description="Run the same requests on two services in turns, and print their ratios pair "
        "by pair. Each is " + _TARGET + ".",
    )
    parser.add_argument("a", metavar="A", help="a service")
    parser.add_argument("b", metavar="B", help="the service to compare it with")
    parser.add_argument("--pairs", type=positive, default=3, help="of runs (default: 3)")
    parser.add_argument(
        "--model",
        help="for {model}, and which one of several models that a service lists (default: the "
        "first), or where it lists none; default: A's",
    )
    parser.add_argument(
        "--pid-a", type=_process_id, help="of A, if it runs already here, for its CPU time"
    )
    parser.add_argument("--pid-b", type=_process_id, help="of B, the same")
    add_load_options(parser)
    add_http_options(parser)
    add_output_options(parser)
    parser.set_defaults(run=_compare)


def _compare(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        from gllm_ray.bench.compare import bench_compare
        from gllm_ray.bench.target import model_directory

        load, tokenizer = parse_load(options), load_tokenizer(options.tokenizer)
        model = options.model or model_directory(options.a)
        return asyncio.run(
            bench_compare(
                (options.a, target_options(options, model=model, pid=options.pid_a)),
                (options.b, target_options(options, model=model, pid=options.pid_b)),
                load,
                tokenizer,
                num_pairs=options.pairs,
                on_step=show_step,
            )
        )

    return measure_and_report(options, measure)


def _add_table(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser("table", help="results as Markdown, from their JSON")
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE", help="written with --json")
    add_metrics_option(parser)
    parser.set_defaults(run=_table)


def _table(options: argparse.Namespace) -> int:
    from gllm_ray.bench.result_file import read_result
    from gllm_ray.bench.result_table import result_tables

    try:
        print(
            result_tables([read_result(file) for file in options.files], options.percentile_metrics)
        )
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _process_id(text: str) -> int:
    import psutil

    pid = positive(text)
    if not psutil.pid_exists(pid):
        raise argparse.ArgumentTypeError(f"{pid}: must be the id of a process that runs here")
    return pid
