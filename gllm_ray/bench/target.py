"""What HTTP benchmarks measure: a service that runs already, ours, or any that a command starts."""

import asyncio
import contextlib
import shlex
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp

from gllm_ray.batch.api_key import key_headers
from gllm_ray.bench.command_process import CommandProcess
from gllm_ray.bench.completions_client import CompletionsClient
from gllm_ray.bench.load_generator import RequestRecord
from gllm_ray.bench.measured_command import show_step
from gllm_ray.bench.prompts import LoadRequest
from gllm_ray.demo.serve_process import ServeProcess, free_port, on_port
from gllm_ray.errors import ConfigError, PipelineError
from gllm_ray.model.checkpoint import find_weight_files
from gllm_ray.serve_file import load_only_service, load_serve_file

_POLL_S = 0.5
_REFUSALS = tuple(f"status {status}: " for status in (400, 401, 403, 422))
# Text, because not every service takes token ids.
_PROBE = LoadRequest(
    request_id="probe", arrival_s=0.0, prompt="a", num_prompt_tokens=1, num_output_tokens=1
)


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetOptions:
    """How a service is started and asked.

    Attributes:
        model: What `{model}` in a command stands for, and which model is asked where the service
            lists several, or none; None: the first one.
        pid: The root of the processes of a service that runs already; None: not known.
        ignore_eos: Ask for whole outputs.
        extra_body: Added to each request.
        timeout_s: How long a start or a request may take.
    """

    model: str | None = None
    pid: int | None = None
    ignore_eos: bool = True
    extra_body: Mapping[str, Any]
    timeout_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A service that answers.

    Attributes:
        pid: The root of its processes; None: not known.
        client: Sends requests to it.
    """

    pid: int | None
    client: CompletionsClient


@contextlib.asynccontextmanager
async def start_target(text: str, options: TargetOptions) -> AsyncIterator[Target]:
    """Start a service, wait until it answers, and end it.

    Args:
        text: An address such as `http://localhost:8000`, of what runs already; a Serve
            configuration; or a command line with `{port}`.
        options: Of this service.

    Raises:
        ConfigError: It is none of these, or has a `pid` and does not run already.
        PipelineError: It did not become ready.
    """
    is_running = text.startswith(("http://", "https://"))
    if options.pid is not None and not is_running:
        raise ConfigError(f"{text!r}: is started here; must be given without the id of a process")
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    # One of ours that ends takes along all that this process has started.
    with contextlib.ExitStack() as stack:
        if is_running:
            url, pid = text.rstrip("/").removesuffix("/v1"), options.pid
            raise_if_ended = _never_ends
        elif _is_serve_config(text):
            url += _route_prefix(Path(text))
            service = stack.enter_context(
                ServeProcess(stack.enter_context(on_port(Path(text), port)))
            )
            pid, raise_if_ended = service.pid, service.raise_if_ended
        else:
            words = command_words(text, port, options.model)
            process = stack.enter_context(CommandProcess(words))
            pid, raise_if_ended = process.pid, process.raise_if_ended
        async with CompletionsClient.open(
            url,
            ignore_eos=options.ignore_eos,
            extra_body=options.extra_body,
            timeout_s=options.timeout_s,
        ) as client:
            try:
                await _wait_until_ready(client, text, url, options, raise_if_ended)
            except RuntimeError as error:
                raise PipelineError(str(error)) from None
            yield Target(pid=pid, client=client)


def model_directory(text: str) -> str | None:
    """Where the model of a service lies, if `start_target` is given a configuration of it.

    Raises:
        ConfigError: The configuration has mistakes, or there is no such model.
    """
    if not _is_serve_config(text):
        return None
    return str(find_weight_files(load_only_service(Path(text)).model)[0].parent)


def command_words(text: str, port: int, model: str | None) -> list[str]:
    """A command line with its port and its model, in words.

    Raises:
        ConfigError: It has no place for a port, or one for a model that is not given.
    """
    if "{port}" not in text:
        raise ConfigError(
            f"{text!r}: must be an address that begins with http://, a Serve configuration that "
            "ends in .yaml, or a command line with {port} in it"
        )
    if "{model}" in text and model is None:
        raise ConfigError(f"{text!r}: has {{model}} in it, but no model is given")
    return [
        word.replace("{port}", str(port)).replace("{model}", model or "")
        for word in shlex.split(text)
    ]


def _never_ends() -> None:
    """What somebody else started is not watched."""


def _is_serve_config(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _route_prefix(file: Path) -> str:
    load_only_service(file)
    return (load_serve_file(file).applications[0].route_prefix or "").rstrip("/")


async def _wait_until_ready(
    client: CompletionsClient,
    name: str,
    base_url: str,
    options: TargetOptions,
    raise_if_ended: Callable[[], None],
) -> None:
    """Ask for a token until one comes: servers listen, and list models, before they can answer."""
    failure, is_told = "no answer yet", False
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(options.timeout_s):
            while failure:
                raise_if_ended()
                client.model = _choose_model(await _listed_models(base_url), options.model)
                failure = await _probe(client)
                if failure.startswith(_REFUSALS):
                    raise RuntimeError(f"{name}: {failure}")  # which time does not change
                if failure and not is_told:
                    show_step(f"{name}: waiting for it up to {options.timeout_s:g} s: {failure}")
                    is_told = True
                await asyncio.sleep(_POLL_S if failure else 0)
            return
    raise RuntimeError(f"{name}: not ready after {options.timeout_s:g} s: {failure}")


async def _probe(client: CompletionsClient) -> str:
    """Why it does not answer; empty: it does."""
    try:
        await client.send(_PROBE, RequestRecord(start_s=0.0, lag_s=0.0))
    except PipelineError as error:
        return str(error)
    return ""


async def _listed_models(base_url: str) -> list[str]:
    """Names of what a service serves; none where it does not tell."""
    with contextlib.suppress(aiohttp.ClientError, ValueError, LookupError, TypeError):
        async with (
            aiohttp.ClientSession(headers=key_headers()) as session,
            session.get(f"{base_url}/v1/models") as response,
        ):
            return [str(card["id"]) for card in (await response.json())["data"]]
    return []


def _choose_model(listed: Sequence[str], model: str | None) -> str:
    if model in listed or not listed:
        return model or ""
    # An only model may be named otherwise: `{model}` is a directory for most commands.
    if model is None or len(listed) == 1:
        return listed[0]
    raise RuntimeError(f"it serves {', '.join(listed)}, but not {model!r}: name one by --model")
