"""`gllm-ray simulate`: its options, and what it does with them."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.errors import ConfigError
from gllm_ray.option_types import not_negative_s, output_file
from gllm_ray.policy_config import POLICY_CONFIGS

if TYPE_CHECKING:
    from gllm_ray.simulation.simulation_config import SimulationConfig

_OF_ONE_RUN = ("trace", "plot_gantt", "gantt_start_s", "plot_utilization", "plot_latencies")


def add_simulate_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add `simulate` to the commands of a parser; it sets `run`."""
    parser = commands.add_parser(
        "simulate",
        help="run a workload in virtual time; needs no GPU and no weights",
        description="Let the serving scheduler serve a workload in virtual time, and report it.",
    )
    parser.add_argument("config", type=Path, metavar="CONFIG.yaml", help="see configs/simulation")
    parser.add_argument("--policy", choices=list(POLICY_CONFIGS), help="instead of the file's")
    parser.add_argument("--seed", type=int, help="instead of the file's")
    parser.add_argument("--json", type=output_file, metavar="FILE", help="write the report as JSON")
    _add_outputs(parser)
    _add_sweep(parser)
    parser.set_defaults(run=_simulate, usage_error=parser.error)


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    outputs = parser.add_argument_group("of one run; charts end in .png or .svg")
    outputs.add_argument(
        "--trace",
        type=output_file,
        metavar="FILE",
        help="when stages computed, for ui.perfetto.dev",
    )
    outputs.add_argument(
        "--plot-gantt",
        type=output_file,
        metavar="FILE",
        help="draw some micro-batches in the stages",
    )
    outputs.add_argument(
        "--gantt-start-s", type=not_negative_s, metavar="S", help="from when on (default: half-way)"
    )
    outputs.add_argument(
        "--plot-utilization", type=output_file, metavar="FILE", help="draw how busy the stages are"
    )
    outputs.add_argument(
        "--plot-latencies",
        type=output_file,
        metavar="FILE",
        help="draw the distribution of latencies",
    )


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    sweep = parser.add_argument_group("of several runs")
    sweep.add_argument(
        "--sweep",
        type=_rates,
        metavar="RATES",
        help="run at each of these requests a second, such as 2,4,8, and print a line for each",
    )
    sweep.add_argument(
        "--plot-sweep", type=output_file, metavar="FILE", help="draw p99 TPOT over the throughput"
    )


def _rates(text: str) -> list[float]:
    try:
        rates = [float(word) for word in text.split(",")]
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < float("inf") for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r}: must be numbers > 0, such as 2,4,8")
    return rates


def _simulate(options: argparse.Namespace) -> int:
    _check_usage(options)
    try:
        _check_charts(options)
        if options.sweep is None:
            _run_once(options)
        else:
            _run_sweep(options)
    except BrokenPipeError:
        raise  # who read the output has left, which is no mistake
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _check_usage(options: argparse.Namespace) -> None:
    is_sweep = options.sweep is not None
    for name in _OF_ONE_RUN if is_sweep else ("plot_sweep",):
        if getattr(options, name) is not None:
            option, word = name.replace("_", "-"), "with" if is_sweep else "without"
            options.usage_error(f"--{option} does not go {word} --sweep")
    if options.gantt_start_s is not None and options.plot_gantt is None:
        options.usage_error("--gantt-start-s does not go without --plot-gantt")


def _check_charts(options: argparse.Namespace) -> None:
    """Refuse charts that could not be drawn, before the simulation takes its time.

    Raises:
        ConfigError: matplotlib is not installed, or a name ends in neither .png nor .svg.
    """
    from gllm_ray.simulation.plots import check_chart

    for name, path in vars(options).items():
        if name.startswith("plot_") and path is not None:
            check_chart(path)


# Each imports what it needs, so that other commands start without the simulator.


def _load(options: argparse.Namespace) -> "SimulationConfig":
    from gllm_ray.simulation.simulation_config import load_simulation_config

    config = load_simulation_config(options.config)
    if options.policy is not None:
        policy = POLICY_CONFIGS[options.policy]()
        scheduler = config.scheduler.model_copy(update={"policy": policy})
        config = config.model_copy(update={"scheduler": scheduler})
    if options.seed is not None:
        config = config.model_copy(update={"seed": options.seed})
    return config


def _run_once(options: argparse.Namespace) -> None:
    from gllm_ray.simulation import outputs, plots, simulate

    config = _load(options)
    uses = (options.trace, options.plot_gantt, options.plot_utilization)
    result = simulate(config, keep_intervals=any(path is not None for path in uses))
    print(outputs.format_result(result))
    if options.json is not None:
        outputs.write_json(options.json, result.report.to_json())
    if options.trace is not None:
        outputs.write_trace(options.trace, result.intervals)
    if options.plot_gantt is not None:
        outputs.plot_gantt(options.plot_gantt, result, options.gantt_start_s)
    if (path := options.plot_utilization) is not None:
        plots.plot_utilization(
            result.intervals,
            path,
            spans_s=result.replica_spans_s,
            num_stages=len(result.report.stages),
            end_s=result.report.wall_s,
        )
    if options.plot_latencies is not None:
        outputs.plot_latencies(options.plot_latencies, result)


def _run_sweep(options: argparse.Namespace) -> None:
    from gllm_ray.simulation import outputs, plots, simulate, sweep

    config = _load(options)
    configs = {rate: sweep.at_rate(config, rate) for rate in options.sweep}
    reports = {}
    print(sweep.TABLE_HEAD)
    for rate, each in configs.items():
        reports[rate] = simulate(each).report
        print(sweep.table_row(rate, reports[rate]), flush=True)
    if note := outputs.nominal_note(reports[options.sweep[0]]):
        print(f"\n{note}")
    if options.json is not None:
        rows = [{"rate_per_s": rate, "report": reports[rate].to_json()} for rate in reports]
        outputs.write_json(options.json, rows)
    if options.plot_sweep is not None:
        curve = [(report.output_tokens_per_s, report.tpot_s.p99) for report in reports.values()]
        plots.plot_throughput_latency({config.scheduler.policy.name: curve}, options.plot_sweep)
