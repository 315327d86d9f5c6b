"""Options of the command line that say which requests are sent, and what is told of them."""

import argparse
import json
from math import inf
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gllm_ray.bench.table_cells import LATENCIES
from gllm_ray.errors import ConfigError
from gllm_ray.option_types import not_negative, output_file, positive, positive_s

if TYPE_CHECKING:
    from tokenizers import Tokenizer

    from gllm_ray.bench.request_load import RequestLoad
    from gllm_ray.bench.target import TargetOptions
    from gllm_ray.simulation.metrics import Slo

_SLO_KEYS = {"ttft": "ttft_s", "tpot": "tpot_s", "e2el": "e2e_s"}


def add_load_options(parser: argparse.ArgumentParser, *, is_online: bool = True) -> None:
    """Add the options that `parse_load` reads."""
    group = parser.add_argument_group("requests, a workload as those of `gllm-ray simulate`")
    group.add_argument(
        "--workload", type=Path, metavar="FILE.yaml", help="has a `workload`, as a simulation has"
    )
    group.add_argument(
        "--input-len", metavar="N", help="prompt tokens or a dataset (default: 256), if no file"
    )
    group.add_argument(
        "--output-len", metavar="N", help="output tokens or a dataset (default: 64), if no file"
    )
    group.add_argument(
        "--num-prompts", type=positive, metavar="N", help="requests (default: the file's, or 64)"
    )
    if is_online:
        group.add_argument(
            "--request-rate",
            metavar="R",
            help="requests a second, a Poisson process, or inf for all at once (default: the "
            "file's, or inf)",
        )
    group.add_argument(
        "--max-concurrency", type=positive, metavar="N", help="requests that run at once, at most"
    )
    group.add_argument(
        "--num-warmups",
        type=not_negative,
        default=16,
        metavar="N",
        help="sent before (default: 16)",
    )
    group.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: 0)")
    group.add_argument(
        "--goodput",
        nargs="+",
        default=[],
        metavar="KEY:MS",
        help="limits that a good request keeps, such as ttft:500 tpot:50; keys: "
        + ", ".join(_SLO_KEYS),
    )


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Add the options about what is told."""
    add_metrics_option(parser)
    add_json_option(parser)


def add_metrics_option(parser: argparse.ArgumentParser) -> None:
    """Add the choice of latencies."""
    parser.add_argument(
        "--percentile-metrics",
        type=_latencies,
        default=list(LATENCIES),
        metavar="KEYS",
        help=f"latencies in the table (default: {','.join(LATENCIES)})",
    )


def add_json_option(parser: argparse.ArgumentParser) -> None:
    """Add where the result goes."""
    parser.add_argument(
        "--json",
        type=output_file,
        metavar="FILE",
        help="write the result, for `gllm-ray bench table`",
    )


def add_http_options(parser: argparse.ArgumentParser) -> None:
    """Add how services are asked over HTTP."""
    group = parser.add_argument_group("HTTP; an API key is that of OPENAI_API_KEY, if it is set")
    group.add_argument(
        "--tokenizer",
        type=Path,
        metavar="DIR",
        help="send prompts as text, spelled by tokenizer.json in DIR; otherwise as token ids",
    )
    group.add_argument(
        "--ignore-eos",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="ask for outputs of full length, which not every service can (default: yes)",
    )
    group.add_argument(
        "--extra-body",
        type=_json_object,
        default={},
        metavar="JSON",
        help="added to the body of each request",
    )
    group.add_argument(
        "--timeout-s",
        type=positive_s,
        default=600.0,
        metavar="S",
        help="of a start, and of a request (default: 600)",
    )


def parse_load(options: argparse.Namespace) -> "RequestLoad":
    """The load that the options describe.

    Raises:
        ConfigError: They contradict each other, or are out of range.
    """
    from gllm_ray.bench.request_load import (
        RequestLoad,
        load_workload,
        parse_workload,
        synthetic_workload,
        with_arrivals,
    )

    if options.workload is None:
        workload = synthetic_workload(options.input_len or "256", options.output_len or "64")
        workload["num_requests"] = 64
    elif options.input_len or options.output_len:
        raise ConfigError("--input-len and --output-len do not go with --workload; change the file")
    else:
        workload = load_workload(options.workload)
    rate = getattr(options, "request_rate", "inf")
    if rate is not None:
        workload = with_arrivals(workload, rate)
    if options.num_prompts is not None:
        workload["num_requests"] = options.num_prompts
    return RequestLoad(
        workload=parse_workload(workload),
        seed=options.seed,
        max_concurrency=options.max_concurrency,
        num_warmups=options.num_warmups,
        slo=parse_slo(options.goodput),
    )


def parse_slo(limits: list[str]) -> "Slo | None":
    """The SLO that words such as `ttft:500` describe, in milliseconds; None of no words.

    Raises:
        ConfigError: One is none.
    """
    from gllm_ray.simulation.metrics import Slo

    values = {}
    for limit in limits:
        key, _, text = limit.partition(":")
        try:
            value_s = float(text) / 1000
        except ValueError:
            value_s = 0.0
        if key not in _SLO_KEYS or not 0 < value_s < inf:
            raise ConfigError(
                f"goodput={limit!r}: must be KEY:MS, where KEY is one of {', '.join(_SLO_KEYS)} "
                "and MS a number > 0"
            )
        values[_SLO_KEYS[key]] = value_s
    return Slo(**values) if values else None


def load_tokenizer(directory: Path | None) -> "Tokenizer | None":
    """The tokenizer that spells prompts; None for token ids.

    Raises:
        ConfigError: There is none.
    """
    if directory is None:
        return None
    from tokenizers import Tokenizer

    file = directory / "tokenizer.json"
    if not file.is_file():
        raise ConfigError(f"tokenizer={str(directory)!r}: must be a directory with tokenizer.json")
    return Tokenizer.from_file(str(file))


def target_options(
    options: argparse.Namespace, *, model: str | None, pid: int | None
) -> "TargetOptions":
    """How a service is asked."""
    from gllm_ray.bench.target import TargetOptions

    return TargetOptions(
        model=model,
        pid=pid,
        ignore_eos=options.ignore_eos,
        extra_body=options.extra_body,
        timeout_s=options.timeout_s,
    )


def _latencies(text: str) -> list[str]:
    names = text.split(",")
    if not set(names) <= set(LATENCIES):
        raise argparse.ArgumentTypeError(f"{text!r}: must be some of {','.join(LATENCIES)}")
    return names


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}: must be a JSON object")
    return value
