"""The benchmarks of a pipeline and of its parts, each on a Ray of its own."""

import argparse
import asyncio
import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.bench.load_options import (
    add_json_option,
    add_load_options,
    add_output_options,
    parse_load,
)
from gllm_ray.bench.measured_command import measure_and_report, show_step
from gllm_ray.option_types import DefaultsFormatter, not_negative_s, output_file, positive
from gllm_ray.serve_file import load_only_service

if TYPE_CHECKING:
    from gllm_ray.bench.result_file import Result
    from gllm_ray.config import ServiceConfig

_SIZES = [2**14, 2**16, 2**18, 2**20, 2**22, 2**24]


def add_pipeline_benchmarks(benchmarks: Any) -> None:  # noqa: ANN401 - argparse names no type
    """Add the benchmarks of a pipeline and of its parts; each sets `run`."""
    _add_engine(benchmarks)
    _add_stage(benchmarks)
    _add_transport(benchmarks)
    _add_front(benchmarks)
    _add_recovery(benchmarks)


def _add_engine(benchmarks: Any) -> None:  # noqa: ANN401
    for name, what in (
        ("engine", "the engine with its stages, no HTTP"),
        ("offline", "a batch through the engine, all at once"),
    ):
        parser = benchmarks.add_parser(
            name,
            help=what,
            description="Start the engine of a service on a Ray of its own, send it requests "
            "from this process, and measure what clients see.",
        )
        _add_config(parser)
        add_load_options(parser, is_online=name == "engine")
        add_output_options(parser)
        parser.add_argument(
            "--trace",
            type=output_file,
            metavar="FILE",
            help="write when each stage computed its latest micro-batches, and their hops, for "
            "Perfetto",
        )
        parser.set_defaults(run=_engine)


def _engine(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        load = parse_load(options)
        with _own_ray(config := load_only_service(options.file)):
            from gllm_ray.bench.engine_bench import bench_engine

            return asyncio.run(bench_engine(options.benchmark, config, load, options.trace))

    return measure_and_report(options, measure)


def _add_stage(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "stage",
        help="the engine against its stages alone: served / bare",
        description="Serve requests, then run the micro-batches that came of them through the "
        "stages alone, side by side and without Ray: what they reach is the most that the "
        "engine could.",
    )
    _add_config(parser)
    parser.add_argument("--rounds", type=positive, default=3, help="of both (default: 3)")
    add_load_options(parser)
    add_json_option(parser)
    parser.set_defaults(run=_stage)


def _stage(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        load = parse_load(options)
        with _own_ray(config := load_only_service(options.file)):
            from gllm_ray.bench.stage_bench import bench_stage

            return asyncio.run(
                bench_stage(config, load, num_rounds=options.rounds, on_step=show_step)
            )

    return measure_and_report(options, measure)


def _add_transport(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "transport",
        help="latency and CPU time of a hop between stages",
        description="Send micro-batches through stages on CPU that compute nothing, one at a time.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument(
        "--transports",
        nargs="+",
        choices=["gloo", "object_store", "direct"],
        default=["gloo", "object_store", "direct"],
        help="as `pipeline.activation_transport` names them; direct: gloo, with that control plane",
    )
    parser.add_argument("--stages", type=_depth, nargs="+", default=[2, 4], help="of the pipeline")
    parser.add_argument(
        "--bytes", type=_float32_bytes, nargs="+", default=_SIZES, help="of the hidden states"
    )
    parser.add_argument("--steps", type=positive, default=100, help="micro-batches of each")
    add_json_option(parser)
    parser.set_defaults(run=_transport)


def _transport(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        with _own_ray():
            from gllm_ray.bench.transport_bench import bench_transport

            return asyncio.run(
                bench_transport(
                    transports=options.transports,
                    depths=options.stages,
                    sizes=options.bytes,
                    num_steps=options.steps,
                    on_step=show_step,
                )
            )

    return measure_and_report(options, measure)


def _add_front(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "front",
        help="CPU time of a streamed token by process, behind each HTTP proxy",
        description="Stream from a model of one random layer through the default proxy of Ray "
        "Serve and through HAProxy, in turns.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument(
        "--streams", type=positive, nargs="+", default=[64, 256], help="requests at once"
    )
    parser.add_argument("--output-len", type=positive, default=128, help="tokens of each")
    parser.add_argument("--rounds", type=positive, default=3, help="of all of it")
    add_json_option(parser)
    parser.set_defaults(run=_front)


def _front(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        from gllm_ray.bench.front_bench import bench_front

        return asyncio.run(
            bench_front(
                num_streams=options.streams,
                num_tokens=options.output_len,
                num_rounds=options.rounds,
                on_step=show_step,
            )
        )

    return measure_and_report(options, measure)


def _add_recovery(benchmarks: Any) -> None:  # noqa: ANN401
    parser = benchmarks.add_parser(
        "recovery",
        help="how long streams stand still when a stage dies, by phase",
        description="Start the engine of a service on a Ray of its own, let requests run, and kill "
        "its stages in turn. Fails unless every request gets all of its tokens.",
        formatter_class=DefaultsFormatter,
    )
    _add_config(parser)
    parser.add_argument("--kills", type=positive, default=6, help="stages that die")
    parser.add_argument("--streams", type=positive, default=8, help="requests at once")
    parser.add_argument("--input-len", type=positive, default=256, help="tokens of their prompts")
    parser.add_argument("--output-len", type=positive, default=256, help="of their outputs")
    parser.add_argument(
        "--calm", type=not_negative_s, default=2, help="seconds between recovery and death"
    )
    add_json_option(parser)
    parser.set_defaults(run=_recovery)


def _recovery(options: argparse.Namespace) -> int:
    def measure() -> "Result":
        with _own_ray(config := load_only_service(options.file)):
            from gllm_ray.bench.recovery_bench import bench_recovery

            return asyncio.run(
                bench_recovery(
                    config,
                    num_streams=options.streams,
                    input_len=options.input_len,
                    output_len=options.output_len,
                    num_kills=options.kills,
                    calm_s=options.calm,
                    on_step=show_step,
                )
            )

    return measure_and_report(options, measure)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", type=Path, metavar="SERVE_CONFIG.yaml", help="has one service")


@contextmanager
def _own_ray(config: "ServiceConfig | None" = None) -> Iterator[None]:
    """A Ray of this process, with as many CPUs as a pipeline reserves."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from gllm_ray.bundles import bundles

    cpus = 0.0 if config is None else sum(bundle["CPU"] for bundle in bundles(config))
    ray.init(address="local", num_cpus=ceil(cpus) + 1, include_dashboard=False, log_to_driver=False)
    try:
        yield
    finally:
        ray.shutdown()


def _depth(text: str) -> int:
    depth = positive(text)
    if depth < 2:
        raise argparse.ArgumentTypeError(f"{depth}: must be >= 2, or there is no hop")
    return depth


def _float32_bytes(text: str) -> int:
    num_bytes = positive(text)
    if num_bytes % 4:
        raise argparse.ArgumentTypeError(f"{num_bytes}: must be a multiple of 4")
    return num_bytes
