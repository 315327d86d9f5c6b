"""`make demo`: serve the embedded model on this machine, ask it something, and keep serving."""

import argparse
import contextlib
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from gllm_ray.chat.stream import ChatTiming, ServiceError, get_json, stream_chat
from gllm_ray.demo.serve_process import INTERRUPTS, ServeProcess, free_port, on_port
from gllm_ray.errors import ConfigError
from gllm_ray.serve_file import load_only_service

CONFIG_FILE = Path("configs/demo.yaml")
PROMPT = "Write a function that reads a file and counts its lines."
READY_TIMEOUT_S = 300.0
# What to show once a line of the service's log matches.
_PHASES = [
    (re.compile(r"Started a local Ray instance"), "starting Serve"),
    (re.compile(r"loading shard (\d+)"), "loading shard {}"),
    (re.compile(r"loaded stage (\d+)"), "shard {} loaded"),
]
_READY = re.compile(r"ready: model=")
_FAILURES = re.compile(r"(ConfigError: .*|Deploying app .* failed.*)")


def main() -> int:
    """Run the demo; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m gllm_ray.demo", description=__doc__)
    parser.add_argument("--once", action="store_true", help="end after the first answer")
    parser.add_argument("--config", type=Path, default=CONFIG_FILE, help="the Serve file to run")
    parser.add_argument("--port", type=int, help="instead of the file's port; 0: any free one")
    arguments = parser.parse_args()
    for interrupt in INTERRUPTS:
        signal.signal(interrupt, _interrupt)
    try:
        load_only_service(arguments.config)
        with _with_free_port(arguments.config, arguments.port) as (config_file, port):
            return _run(config_file, f"http://127.0.0.1:{port}", is_once=arguments.once)
    except KeyboardInterrupt:
        print("\nstopped: every process of the demo has ended")
        return 0
    except (ConfigError, ServiceError, RuntimeError, TimeoutError, OSError) as error:
        print(f"\ndemo failed: {error}", file=sys.stderr)
        return 1


def _run(config_file: Path, base_url: str, *, is_once: bool) -> int:
    start = time.monotonic()
    with ServeProcess(config_file) as service:
        server_info = _wait_until_ready(service, base_url, start)
        body = {
            "model": server_info["model"],
            "messages": [{"role": "user", "content": PROMPT}],
            "max_tokens": 128,
            "temperature": 0,
        }
        print(f"\nYou: {PROMPT}\nModel:")
        timing = _print_answer(base_url, body)
        _print_table(server_info, timing)
        if not is_once:
            _print_address(base_url, server_info["model"])
            print("\nServing until Ctrl-C ...", flush=True)
            while True:
                time.sleep(1)
                service.raise_if_ended()
    return 0


def _wait_until_ready(service: ServeProcess, base_url: str, start: float) -> dict[str, Any]:
    progress = _Progress(start)
    progress.show("starting Ray")
    while True:
        service.raise_if_ended()
        for phase in _phases_of(service):
            progress.show(phase)
        # The address alone does not tell: another service may have answered there.
        if any(_READY.search(line) for line in service.log_lines()):
            with contextlib.suppress(OSError, ValueError):
                server_info = get_json(f"{base_url}/server_info")
                progress.show("ready")
                progress.end()
                return server_info
        if time.monotonic() - start > READY_TIMEOUT_S:
            raise TimeoutError(f"not ready after {READY_TIMEOUT_S:.0f} s:\n{service.log_tail()}")
        time.sleep(0.2)


def _phases_of(service: ServeProcess) -> Iterator[str]:
    for line in service.log_lines():
        if failure := _FAILURES.search(line):
            raise RuntimeError(f"{failure.group(1)}\n(whole log: {service.log_file})")
        for pattern, phase in _PHASES:
            if match := pattern.search(line):
                yield phase.format(*match.groups())


class _Progress:
    """One line that grows on a terminal; one line a phase elsewhere."""

    def __init__(self, start: float) -> None:
        self._start = start
        self._shown: list[str] = []

    def show(self, phase: str) -> None:
        if phase in self._shown:
            return
        self._shown.append(phase)
        elapsed = f"[{time.monotonic() - self._start:5.1f} s]"
        if sys.stdout.isatty():
            print(f"\r\033[K{elapsed} {' > '.join(self._shown[-5:])}", end="", flush=True)
        else:
            print(f"{elapsed} {phase}", flush=True)

    def end(self) -> None:
        if sys.stdout.isatty():
            print()


def _print_answer(base_url: str, body: dict[str, Any]) -> ChatTiming:
    for piece in stream_chat(base_url, body):
        if isinstance(piece, ChatTiming):
            print()
            return piece
        print(piece, end="", flush=True)
    raise RuntimeError("the answer ended without its timing")


def _print_table(server_info: dict[str, Any], timing: ChatTiming) -> None:
    print(f"\n{'stage':>8}  {'layers':>7}  {'parameters':>11}  {'weights':>9}  {'KV blocks':>9}")
    for stage in server_info["stages"]:
        print(
            f"{stage['stage_id']:>8}  {stage['first_layer']:>3}-{stage['last_layer'] - 1:<3}  "
            f"{stage['num_parameters']:>11,}  {stage['weight_bytes'] / 2**20:>5.1f} MiB  "
            f"{stage['max_kv_blocks']:>9,}"
        )
    print(
        f"\n{server_info['num_blocks']:,} KV blocks of {server_info['block_size']} tokens | "
        f"TTFT {timing.ttft_s * 1000:.0f} ms | {timing.tokens_per_s:.0f} tokens/s"
    )


def _print_address(base_url: str, model: str) -> None:
    print(f"\nOpenAI-compatible API: {base_url}/v1   Try:")
    print(
        f"curl -N {base_url}/v1/chat/completions -H 'Content-Type: application/json' -d "
        f'\'{{"model": "{model}", "stream": true, "messages": '
        '[{"role": "user", "content": "Write a function that adds two numbers."}]}\''
    )


@contextlib.contextmanager
def _with_free_port(config_file: Path, port: int | None) -> Iterator[tuple[Path, int]]:
    """Yield a configuration whose port is free, and the port."""
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    wanted = config["http_options"]["port"] if port is None else port
    free = free_port(wanted)
    if free == config["http_options"]["port"]:
        yield config_file, free
        return
    if wanted not in (0, free):
        print(f"port {wanted} is in use, so the demo serves on port {free}")
    with on_port(config_file, free) as copy:
        yield copy, free


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main())
