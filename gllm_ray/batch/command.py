"""`python -m gllm_ray.batch`: from the options to a job, and to an exit status."""

import argparse
import asyncio
import hashlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from math import ceil
from pathlib import Path, PurePosixPath
from typing import Any

from gllm_ray.batch.answers import Answers, HttpAnswers, look_up_model
from gllm_ray.batch.api_key import key_headers
from gllm_ray.batch.job import BatchJob, JobResult
from gllm_ray.batch.locations import fetch, is_remote
from gllm_ray.batch.options import (
    MAX_IN_FLIGHT,
    URL_MAX_IN_FLIGHT,
    URL_TIMEOUT_S,
    make_parser,
    row_template,
    suffix_of,
)
from gllm_ray.batch.records import BatchRow, Mistake, read_jsonl
from gllm_ray.batch.requests import RequestChecks
from gllm_ray.batch.tables import TABLE_SUFFIXES, check_output, read_table
from gllm_ray.batch.workspace import errors_name, open_workspace
from gllm_ray.config import ModelConfig, ServiceConfig
from gllm_ray.errors import ConfigError, GllmRayError
from gllm_ray.model.checkpoint import local_directory, open_checkpoint
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serve_file import load_only_service
from gllm_ray.serving.generation_requests import RequestBuilder

_JOB_VARIABLE = "RAY_JOB_CONFIG_JSON_ENV_VAR"  # which Ray sets for the entrypoint of a job
_SIGNAL_STATUS = 128


def main(arguments: list[str] | None = None) -> int:
    """Run a job.

    Returns:
        0: every row succeeded. 2: some failed. 1: nothing was run, or the job broke off. 143 or
        130: SIGTERM or SIGINT stopped it. A job that did not end goes on when it is run again.
    """
    options = make_parser().parse_args(arguments)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    return run_to_status(_run(options), options.output)


def run_to_status(job: Coroutine[Any, Any, JobResult], output: str) -> int:
    """Run a job in an event loop of its own; see `main` for the status."""
    try:
        result = asyncio.run(_until_sigterm(job))
    except (GllmRayError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    except (asyncio.CancelledError, SystemExit):  # the latter by Ray, while it connects
        return _stopped(signal.SIGTERM)
    except KeyboardInterrupt:
        return _stopped(signal.SIGINT)
    summary = f"{result.num_rows - result.num_failed} of {result.num_rows} rows in {output}"
    errors = f", {result.num_failed} in {_errors_of(output)}" if result.num_failed else ""
    print(summary + errors)
    return 2 if result.num_failed else 0


async def _until_sigterm(job: Coroutine[Any, Any, JobResult]) -> JobResult:
    task = asyncio.ensure_future(job)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await task


def _stopped(by: signal.Signals) -> int:
    print("stopped; run it again to go on from here", file=sys.stderr)
    return _SIGNAL_STATUS + by


def _errors_of(output: str) -> str:
    name = PurePosixPath(output).name
    return output.removesuffix(name) + errors_name(name)


async def _run(options: argparse.Namespace) -> JobResult:
    _refuse_lost_output(options.output)
    if options.output == options.input:
        raise ConfigError(f"--output={options.output}: must be another file than --input")
    with tempfile.TemporaryDirectory(prefix="gllm_ray_input") as directory:
        source = await asyncio.to_thread(fetch, options.input, Path(directory))
        make_job = _job_of_config if options.url is None else _job_of_url
        job = await make_job(options, source)
        with open_workspace(options.output) as workspace:
            return await job.run(workspace)


def _refuse_lost_output(output: str) -> None:
    is_relative = not is_remote(output) and not output.startswith(("/", "file://"))
    if is_relative and _JOB_VARIABLE in os.environ:
        raise ConfigError(
            f"--output={output}: must be absolute, or a URI, in a Ray job: its working directory "
            f"{os.getcwd()} is a copy that Ray made and throws away"
        )


async def _job_of_config(options: argparse.Namespace, source: Path) -> BatchJob:
    for option, value in (
        ("--timeout-s", options.timeout_s),
        ("--api-key-env", options.api_key_env),
    ):
        if value is not None:
            raise ConfigError(f"{option}: must be left out with --config; it is for --url")
    config = load_only_service(options.config)
    checkpoint = open_checkpoint(config.model)
    tokenizer = await asyncio.to_thread(Tokenizer.for_model, config.model)
    checks = RequestChecks(
        model_name=config.model.name,
        builder=RequestBuilder(tokenizer, checkpoint.max_model_len),
        is_single=suffix_of(options.output) in TABLE_SUFFIXES,
    )

    @asynccontextmanager
    async def start() -> AsyncIterator[Answers]:
        # It imports Ray, and what a stage computes with.
        from gllm_ray.batch.pipeline import start_pipeline

        connect_ray(config, options.address)
        async with start_pipeline(config, tokenizer) as answers:
            yield answers

    model = identify_model(config.model, checkpoint.directory)
    max_in_flight = options.max_in_flight or MAX_IN_FLIGHT
    return _make_job(options, source, checks, model, start, max_in_flight)


async def _job_of_url(options: argparse.Namespace, source: Path) -> BatchJob:
    if options.address is not None:
        raise ConfigError("--address: must be left out with --url, which needs no Ray")
    url = options.url.rstrip("/").removesuffix("/v1")  # which OpenAI's clients want
    headers = key_headers(options.api_key_env)
    model = await look_up_model(url, headers)
    checks = RequestChecks(
        model_name=model["id"], builder=None, is_single=suffix_of(options.output) in TABLE_SUFFIXES
    )

    def start() -> AbstractAsyncContextManager[Answers]:
        timeout_s = options.timeout_s or URL_TIMEOUT_S
        return HttpAnswers.open(url, headers=headers, timeout_s=timeout_s)

    max_in_flight = options.max_in_flight or URL_MAX_IN_FLIGHT
    return _make_job(options, source, checks, model, start, max_in_flight)


def _make_job(
    options: argparse.Namespace,
    source: Path,
    checks: RequestChecks,
    model: dict[str, Any],
    start: Callable[[], AbstractAsyncContextManager[Answers]],
    max_in_flight: int,
) -> BatchJob:
    template = row_template(options, checks.model_name)
    settings = None

    def read_rows() -> Iterator[BatchRow | Mistake]:
        return read_jsonl(source) if template is None else read_table(source, template)

    if template is not None:
        check_output(source, suffix_of(options.output))
        settings = {
            "endpoint": template.url,
            "prompt_column": template.prompt_column,
            "template": template.template,
            "id_column": template.id_column,
            "params": template.params,
        }
    with source.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    return BatchJob(
        name=options.input,
        source=source,
        read_rows=read_rows,
        output_suffix=suffix_of(options.output),
        identity={"input_sha256": sha256, "model": model, "requests": settings},
        checks=checks,
        start_answers=start,
        max_in_flight=max_in_flight,
        retry_errors=options.retry_errors,
    )


def identify_model(model: ModelConfig, directory: Path) -> dict[str, Any]:
    """What tells whether answers come from the same weights, without reading all of them."""
    config = hashlib.sha256((directory / "config.json").read_bytes()).hexdigest()
    identity = {**model.model_dump(mode="json"), "config_sha256": config}
    if local_directory(model.path) is None:
        # Weights come later, into a directory that is named after the commit.
        return {**identity, "commit": directory.name}
    weights = {path.name: path.stat().st_size for path in sorted(directory.glob("*.safetensors"))}
    return {**identity, "weight_bytes": weights}


def connect_ray(config: ServiceConfig, address: str | None) -> None:
    """Join a cluster, that of a Ray job if this is one, or start one for this process."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray

    from gllm_ray.bundles import bundles

    if ray.is_initialized():
        return
    on_sigterm = signal.getsignal(signal.SIGTERM)
    address = address or os.environ.get("RAY_ADDRESS")
    if address is not None:
        ray.init(address=address, log_to_driver=False)
    else:
        cpus = ceil(sum(bundle["CPU"] for bundle in bundles(config)))
        num_cpus = max(cpus, os.cpu_count() or 1)
        ray.init(address="local", num_cpus=num_cpus, include_dashboard=False, log_to_driver=False)
    signal.signal(signal.SIGTERM, on_sigterm)  # Ray's own ends the process at once
