"""`gllm-ray plan`: which GPUs, stages, replicas and policy serve a workload within an SLO."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gllm_ray.errors import ConfigError
from gllm_ray.option_types import output_file, positive
from gllm_ray.simulation.plan_config import PlanConfig, load_plan_config
from gllm_ray.simulation.plan_evaluation import evaluate, headroom, in_processes, screen
from gllm_ray.simulation.plan_ranking import cost_frontier, finalists, ranked, violations
from gllm_ray.simulation.plan_report import Plan, format_plan, format_rejections, memory_table
from gllm_ray.simulation.plan_serve_file import serve_yaml
from gllm_ray.simulation.planner import Choice, enumerate_choices, is_servable
from gllm_ray.simulation.workload_config import AtOnceArrivalsConfig

_NUM_HEADROOMS = 3
_BAR_CHARACTERS = 30


def add_plan_parser(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    """Add the command to a parser; it sets `run`."""
    parser = commands.add_parser(
        "plan",
        help="which GPUs, stages, replicas and policy meet an SLO, in virtual time",
        description="Simulates the deployments that a plan's file describes and tells what they "
        "cost, how fast they are, and which to take; needs no GPU.",
    )
    parser.add_argument("file", type=Path, metavar="PLAN.yaml")
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--memory-only", action="store_true", help="weights and KV blocks alone; simulate nothing"
    )
    parser.add_argument(
        "--processes",
        type=positive,
        default=os.cpu_count() or 1,
        metavar="N",
        help="simulations at once (default: one for each CPU); the result is the same",
    )
    what.add_argument(
        "--output",
        type=output_file,
        metavar="SERVE.yaml",
        help="where to write the file; else printed",
    )
    parser.set_defaults(run=_plan)


def make_plan(
    config: PlanConfig,
    choices: list[Choice],
    *,
    num_processes: int = 1,
    on_progress: Callable[[str, int, int], None] = lambda _what, _done, _total: None,
) -> Plan:
    """Simulate choices and rank them; the same whatever the number of processes.

    Args:
        config: The plan.
        choices: One or more.
        num_processes: Simulations at once.
        on_progress: Told what is going on, and how many of how many are done.
    """

    def run(what: str, function: Callable[[PlanConfig, Choice], Any], items: list[Choice]) -> Any:  # noqa: ANN401
        return in_processes(
            function,
            config,
            items,
            num_processes=num_processes,
            on_progress=lambda done, total: on_progress(what, done, total),
        )

    screened = run("screening", screen, choices)
    chosen = finalists(config, screened)
    outcomes = ranked(config, run("simulating", evaluate, chosen))
    good = [outcome.choice for outcome in outcomes if not violations(config, outcome)]
    servable = [choice for choice in good if is_servable(choice)]
    tried = list(dict.fromkeys([*servable[:1], *good[:_NUM_HEADROOMS]]))
    if isinstance(config.workload.arrivals, AtOnceArrivalsConfig):
        tried = []  # they have no rate
    multiples = run("headroom", headroom, tried)
    return Plan(
        outcomes=tuple(outcomes),
        dropped=tuple(each for each in ranked(config, screened) if each.choice not in chosen),
        frontier=tuple(cost_frontier(config, outcomes)),
        best=next((each for each in outcomes if each.choice in servable[:1]), None),
        headroom=dict(zip(tried, multiples, strict=True)),
    )


def _plan(options: argparse.Namespace) -> int:
    try:
        config = load_plan_config(options.file)
        choices, rejections = enumerate_choices(config)
        if rejections:
            print(f"Not possible:\n{format_rejections(rejections)}\n")
        if not choices:
            raise ConfigError(f"{options.file}: nothing that is searched is possible")  # noqa: TRY301
        print(memory_table(config, list(dict.fromkeys(choice.cut for choice in choices))))
        if options.memory_only:
            return 0
        plan = make_plan(
            config, choices, num_processes=options.processes, on_progress=_show_progress
        )
        print(f"\n{format_plan(config, plan)}")
        if plan.best is None:
            return 1
        _write(serve_yaml(config, plan.best.choice), options.output)
        device = plan.best.choice.cut.device
        if len(config.gpus) > 1 and config.gpu(device).accelerator_type is None:
            print(
                f"{device}: the file leaves Ray to take other GPUs, too; give the accelerator_type "
                "that Ray calls it by",
                file=sys.stderr,
            )
    except BrokenPipeError:
        raise  # who read the output has left, which is no mistake
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _write(text: str, path: Path | None) -> None:
    if path is None:
        print(f"\n{text}", end="")
    else:
        path.write_text(text, encoding="utf-8")
        print(f"\nwrote {path}; run it with: gllm-ray serve {path}")


def _show_progress(what: str, done: int, total: int) -> None:
    if sys.stderr.isatty():
        bar = ("#" * (done * _BAR_CHARACTERS // total)).ljust(_BAR_CHARACTERS, ".")
        end = "\n" if done == total else ""
        print(f"\r{what:10} [{bar}] {done}/{total}", end=end, file=sys.stderr, flush=True)
