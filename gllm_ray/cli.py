"""The command line: one parser, and a function for each command.

Neither Ray nor torch is imported to check a file: that is done where they are not installed.
"""

import argparse
import os
import signal
import socket
import sys
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

from gllm_ray import __version__
from gllm_ray.bench.command import add_bench_parser
from gllm_ray.bench.profile_command import add_profile_parser
from gllm_ray.chat.command import add_chat_parser
from gllm_ray.config import FrontEndConfig, ServiceConfig
from gllm_ray.errors import ConfigError
from gllm_ray.manifests.command import (
    add_crd_option,
    add_manifests_parser,
    is_manifest,
    load_checks,
    validate_manifests,
)
from gllm_ray.option_types import output_file
from gllm_ray.serve_file import load_serve_file, services_of
from gllm_ray.serve_schema import Application
from gllm_ray.simulation.command import add_simulate_parser
from gllm_ray.simulation.plan_command import add_plan_parser
from gllm_ray.strict_schema import key_table


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit status, and does not return from a good `serve`."""
    options = _parser().parse_args(arguments)
    try:
        status: int = options.run(options)
        sys.stdout.flush()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except BrokenPipeError:
        # Who read the output, such as `head`, has left; what is buffered must go somewhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gllm-ray", description="Pipeline-parallel LLM inference on Ray Serve."
    )
    parser.add_argument("--version", action="version", version=f"gllm-ray {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    validate = commands.add_parser(
        "validate",
        help="check configurations and Kubernetes manifests; starts nothing",
        description="Check files of Ray Serve, Kubernetes manifests, and kustomize overlays.",
    )
    validate.add_argument("paths", nargs="+", type=Path, metavar="PATH")
    add_crd_option(validate)
    validate.set_defaults(run=_validate)
    serve = commands.add_parser("serve", help="check a configuration file, then `serve run` it")
    serve.add_argument("file", type=Path, metavar="FILE")
    serve.add_argument("--address", help="the Ray cluster to join; `local`: start one")
    serve.set_defaults(run=_serve)
    add_chat_parser(commands)
    keys = commands.add_parser("keys", help="print every key of `args` as a Markdown table")
    others = keys.add_mutually_exclusive_group()
    others.add_argument("--frontend", action="store_true", help="those of `frontend` instead")
    others.add_argument(
        "--simulation", action="store_true", help="those of the files of `simulate` instead"
    )
    keys.set_defaults(run=_print_keys)
    _add_train_lengths(commands)
    add_profile_parser(commands)
    add_bench_parser(commands)
    add_simulate_parser(commands)
    add_plan_parser(commands)
    add_manifests_parser(commands)
    return parser


def _add_train_lengths(commands: Any) -> None:  # noqa: ANN401 - argparse does not name its type
    train = commands.add_parser(
        "train-lengths",
        help="train a classifier of output lengths from a service's log",
        description="Train a classifier of output lengths from the file that "
        "`scheduler.length_log` names, and tell how well it does on a fifth of it, held out.",
    )
    train.add_argument("log", type=Path, metavar="LOG.jsonl", help="the log of a service")
    train.add_argument(
        "--output",
        type=output_file,
        required=True,
        metavar="FILE",
        help="where to write the classifier, the `path` of `length_predictor`; overwritten",
    )
    train.add_argument(
        "--classes",
        type=int,
        choices=range(3, 33),
        default=5,
        metavar="N",
        help="classes of length, 3 to 32 (default: 5)",
    )
    train.add_argument(
        "--seed", type=int, default=0, help="draws the rows that are held out (default: 0)"
    )
    train.set_defaults(run=_train_lengths)


def _train_lengths(options: argparse.Namespace) -> int:
    from gllm_ray.length_training import read_length_log, train_classifier  # it imports torch

    try:
        classifier, evaluation = train_classifier(
            read_length_log(options.log), num_classes=options.classes, seed=options.seed
        )
        options.output.write_text(classifier.model_dump_json() + "\n", encoding="utf-8")
    except (ConfigError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    print(evaluation.table())
    print(f"\nwrote {options.output}")
    return 0


def _validate(options: argparse.Namespace) -> int:
    try:
        checks = load_checks(options.crd_dir)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 1
    are_valid = [
        validate_manifests(path, checks) if is_manifest(path) else _is_valid(path)
        for path in options.paths
    ]
    return 0 if all(are_valid) else 1


def _serve(options: argparse.Namespace) -> int:
    if not _is_valid(options.file):
        return 1
    file = load_serve_file(options.file)
    cluster = options.address or os.environ.get("RAY_ADDRESS")
    if cluster in (None, "", "local") and file.proxy_location != "Disabled":
        http = file.http_options
        joins = not cluster and _ray_start_file().exists()
        if (reason := _why_no_listening(http.host, http.port, joins=joins)) is not None:
            print(f"{options.file}: http_options.port={http.port}: {reason}", file=sys.stderr)
            return 1
    # `serve run` goes on for ever after a wrong file, so it was checked first.
    serve = str(Path(sys.executable).with_name("serve"))
    address = ["--address", options.address] if options.address else []
    try:
        return os.execv(serve, [serve, "run", str(options.file), *address])
    except OSError as error:
        print(f"{serve}: {error.strerror}; install ray[serve] beside gllm_ray", file=sys.stderr)
        return 1


def _ray_start_file() -> Path:
    """The file in which `ray start` leaves the address of a cluster that Ray then joins."""
    temporary = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    return Path(temporary) / "ray" / "ray_current_cluster"


def _why_no_listening(host: str, port: int, *, joins: bool) -> str | None:
    """Why an HTTP proxy could not be started here; None if it could, or is there already.

    Serve would try for ever, with a traceback each time; beside the proxy of another cluster it
    would listen on the same port, and each service would get a part of the requests.

    Args:
        host: Where it listens.
        port: The same.
        joins: Whether a cluster that runs is joined, whose proxy may be there.
    """
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        reason = error.strerror
    else:
        return None
    if joins:
        with suppress(OSError, HTTPException):  # no answer, or one that is not Serve's
            address = f"[{host}]" if ":" in host else host
            with urlopen(f"http://{address}:{port}/-/healthz", timeout=2):
                return None
    return f"{reason}; free it, name another, or give the --address of the cluster to join"


def _print_keys(options: argparse.Namespace) -> int:
    from gllm_ray.simulation.simulation_config import SimulationConfig

    if options.frontend:
        print(key_table(FrontEndConfig))
    else:
        print(key_table(SimulationConfig if options.simulation else ServiceConfig))
    return 0


def _is_valid(path: Path) -> bool:
    try:
        applications = load_serve_file(path).applications
    except ConfigError as error:
        print(error, file=sys.stderr)
        return False
    print(f"OK {path}: {'; '.join(map(_summary, applications)) or 'no application'}", flush=True)
    return True


def _summary(application: Application) -> str:
    configs = services_of(application).values()
    if not configs:
        return f"{application.import_path}, whose args are not checked"
    return "; ".join(map(_describe_service, configs))


def _describe_service(config: ServiceConfig) -> str:
    pipeline, deployment = config.pipeline, config.deployment
    device = "CPU" if pipeline.device == "cpu" else f"{pipeline.gpus_per_stage:g} GPU"
    fewest, most = deployment.min_replicas, deployment.max_replicas
    replicas = ("" if fewest == most else f"{fewest} to ") + _count(most, "replica")
    return f"{config.model.name}, {_count(pipeline.num_stages, 'stage')} x {device}, {replicas}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


if __name__ == "__main__":
    sys.exit(main())
