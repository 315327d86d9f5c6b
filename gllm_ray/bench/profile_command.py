"""`gllm-ray profile`."""

import argparse
import sys
from pathlib import Path
from typing import Any

from gllm_ray.bench.result_file import write_json
from gllm_ray.errors import GllmRayError
from gllm_ray.option_types import DefaultsFormatter, output_file, positive, positive_s
from gllm_ray.serve_file import load_only_service


def add_profile_parser(commands: Any) -> None:  # noqa: ANN401
    """Add `profile` to the commands of a parser."""
    parser = commands.add_parser(
        "profile",
        help="measure the stages of a service on this machine, for the simulator",
        description="Load every stage of a service into this process, and measure how long it "
        "takes for micro-batches of all kinds and sizes. Nothing else should run meanwhile.",
        formatter_class=DefaultsFormatter,
    )
    parser.add_argument("file", type=Path, metavar="SERVE_CONFIG.yaml", help="has one service")
    parser.add_argument("--output", type=output_file, required=True, help="the profile, as JSON")
    parser.add_argument(
        "--calibration", type=output_file, help="write what `scheduler.cost_calibration` names, too"
    )
    parser.add_argument(
        "--seconds", type=positive_s, default=60, help="at most; then the rest is left"
    )
    parser.add_argument("--repeats", type=positive, default=5, help="of each micro-batch")
    parser.set_defaults(run=_profile)


def _profile(options: argparse.Namespace) -> int:
    from gllm_ray.bench.service_profile import (  # it imports torch
        calibrate,
        profile_service,
        service_layout,
    )

    try:
        config = load_only_service(options.file)
        layout = service_layout(config) if options.calibration else None
        profile = profile_service(
            config, max_s=options.seconds, repeats=options.repeats, on_progress=_show_progress
        )
        write_json(options.output, profile.model_dump())
        print(f"wrote {options.output}")
        if layout is not None:
            write_json(options.calibration, calibrate(layout, profile).to_calibration())
            print(f"wrote {options.calibration}")
    except (GllmRayError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


def _show_progress(num_done: int, num_all: int) -> None:
    print(f"measured {num_done} of {num_all} micro-batches", file=sys.stderr)
