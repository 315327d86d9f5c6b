"""What the commands of `gllm-ray bench` that write a result have in common."""

import argparse
import signal
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

from gllm_ray.errors import GllmRayError

if TYPE_CHECKING:
    from gllm_ray.bench.result_file import Result


def measure_and_report(options: argparse.Namespace, measure: Callable[[], "Result"]) -> int:
    """Measure, print the table and write the JSON; 1 if that fails, or a request did."""
    from gllm_ray.bench.result_file import failures, write_json
    from gllm_ray.bench.result_table import result_tables

    # As a Ctrl-C does, a SIGTERM ends what was started. Shells let their background jobs ignore
    # SIGINT, and so all that these start, which is ended by it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
    try:
        result = measure()
        latencies = getattr(options, "percentile_metrics", [])
        print(result_tables([result], latencies))
        if options.json is not None:
            write_json(options.json, result)
            print(f"\nwrote {options.json}")
    except (GllmRayError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    failed = failures(result)
    for reason, count in failed.items():
        print(f"{count} requests failed: {reason}", file=sys.stderr)
    return 1 if failed else 0


def show_step(step: str) -> None:
    """Tell what is done next, apart from the results."""
    print(step, file=sys.stderr, flush=True)
