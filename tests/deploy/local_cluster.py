"""A Ray cluster of several nodes on this machine, with a token, as KubeRay would start its pods."""

import contextlib
import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import pytest

from gllm_ray.demo.serve_process import free_port
from gllm_ray.strict_yaml import read_documents
from tests.deploy.manifests import DEPLOY, ROOT
from tests.process_titles import titles

PORT = 8000  # as the configuration says
START_TIMEOUT_S = 60
DEPLOY_TIMEOUT_S = 120
_PORTS = (
    "dashboard-agent-listen-port",
    "dashboard-agent-grpc-port",
    "runtime-env-agent-port",
    "node-manager-port",
    "object-manager-port",
)


class LocalCluster:
    """A head without CPUs and workers, as a context manager; every process ends with it.

    Attributes:
        gcs_address: Of the head, for nodes.
        dashboard: The address that `serve deploy` and `ray job submit` take.
        metrics_ports: Where Prometheus would ask, the head's first.
        environment: Of a client that knows the token.
    """

    def __init__(self, *, worker_cpus, head_options=(), head_environment=None):
        self._directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self._processes = []
        self.gcs_address, dashboard = f"127.0.0.1:{free_port()}", free_port()
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.metrics_ports = []
        self.environment = self._environment()
        self._head = [
            *("--head", "--num-cpus=0", f"--port={self.gcs_address.partition(':')[2]}"),
            *(f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1"),
            *(f"--ray-client-server-port={free_port()}", f"--temp-dir={self._directory}"),
            *head_options,
        ]
        self._head_environment = head_environment or {}
        self._workers = [
            [f"--address={self.gcs_address}", f"--num-cpus={cpus}"] for cpus in worker_cpus
        ]

    def __enter__(self):
        try:
            self.start_head()
            for options in self._workers:
                # One by one: a port that is free now may be taken by a node that starts meanwhile.
                self._processes.append(self._start_node(options))
                self._wait_until(lambda: len(self.living_nodes()) == len(self._processes))
        except BaseException:
            self._end()
            raise
        return self

    def __exit__(self, *_):
        self._end()

    def start_head(self):
        """Start the head, again if `kill_head` ended it."""
        self._processes.insert(0, self._start_node(self._head, self._head_environment))
        self._wait_until(lambda: self.status_of("/api/version") == 200)

    def kill_head(self):
        """End every process of the head."""
        _kill(self._processes.pop(0))
        # A pod that KubeRay starts again finds no files of the one before.
        (self._directory / "ray_current_cluster").unlink()

    def workers_processes(self):
        """The titles of processes on the workers, by process id."""
        found = {}
        for process in self._processes[1:]:
            found |= titles(process.pid)
        return found

    def run(self, *command, timeout_s=110):
        """What a command of Ray prints, run by a client with the token."""
        return subprocess.run(
            [Path(sys.executable).with_name(command[0]), *command[1:]],
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
            env=self.environment,
        )

    def deploy_overlay(self, name):
        """The address of a service, deployed with the text that KubeRay would get."""
        (manifest,) = [
            item
            for item in read_documents(DEPLOY / "overlays" / name / "rendered.yaml")
            if item["kind"] == "RayService"
        ]
        file = self._directory / "config.yaml"
        file.write_text(manifest["spec"]["serveConfigV2"], encoding="utf-8")
        result = self.run("serve", "deploy", str(file), "--address", self.dashboard)
        assert result.returncode == 0, result.stdout + result.stderr
        self.wait_until_running()
        return f"http://127.0.0.1:{PORT}"

    def wait_until_running(self):
        """Wait until Serve tells that the application runs."""
        deadline_s = time.monotonic() + DEPLOY_TIMEOUT_S
        while "RUNNING" not in (statuses := self._statuses()):
            assert time.monotonic() < deadline_s, statuses
            assert "DEPLOY_FAILED" not in statuses, statuses
            time.sleep(1)

    def _statuses(self):
        result = self.run("serve", "status", "--address", self.dashboard)
        return re.findall(r"^ +status: (\w+)", result.stdout, re.MULTILINE)

    def list(self, kind):
        """What `ray list` knows of nodes or actors."""
        result = self.run("ray", "list", kind, "--format=json", "--address", self.dashboard)
        return json.loads(result.stdout) if result.stdout.startswith("[") else []

    def living_nodes(self):
        """The ids of nodes, the head's first."""
        living = [node for node in self.list("nodes") if node["state"] == "ALIVE"]
        return [node["node_id"] for node in sorted(living, key=lambda n: not n["is_head_node"])]

    def status_of(self, path, token=True):
        """The HTTP status of a page of the dashboard; 0 if nobody answers."""
        headers = {"Authorization": f"Bearer {self.environment['RAY_AUTH_TOKEN']}"}
        request = urllib.request.Request(self.dashboard + path, headers=headers if token else {})
        try:
            with urllib.request.urlopen(request, timeout=5) as response:
                return response.status
        except urllib.error.HTTPError as error:
            return error.code
        except OSError:
            return 0

    def metrics(self):
        """All that Prometheus would get."""
        return "".join(_get(f"http://127.0.0.1:{port}/metrics") for port in self.metrics_ports)

    def _environment(self):
        programs = Path(sys.executable).parent
        unset = {"RAY_ADDRESS", "RAY_SERVE_ENABLE_HA_PROXY"}
        return {key: value for key, value in os.environ.items() if key not in unset} | {
            "PATH": f"{programs}{os.pathsep}{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_ADDRESS": self.gcs_address,
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_memory_monitor_refresh_ms": "0",
        }

    def _start_node(self, options, environment=None):
        metrics_port = free_port()
        self.metrics_ports.append(metrics_port)
        ports = [f"--{name}={free_port()}" for name in _PORTS]
        command = [
            *(Path(sys.executable).with_name("ray"), "start", "--block", *options, *ports),
            *(f"--metrics-export-port={metrics_port}", "--object-store-memory=100000000"),
            *("--min-worker-port=0", "--max-worker-port=0", "--node-ip-address=127.0.0.1"),
        ]
        with (self._directory / f"node{metrics_port}.log").open("wb") as log:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=self.environment | (environment or {}),
                cwd=self._directory,
                start_new_session=True,
            )

    def _wait_until(self, holds):
        deadline_s = time.monotonic() + START_TIMEOUT_S
        while not holds():
            if time.monotonic() > deadline_s or any(p.poll() is not None for p in self._processes):
                logs = [path.read_text("utf-8") for path in self._directory.glob("node*.log")]
                raise TimeoutError("the cluster does not start:\n" + "\n".join(logs))
            time.sleep(0.5)

    def _end(self):
        for process in self._processes:
            _kill(process)
        shutil.rmtree(self._directory, ignore_errors=True)


def _kill(process):
    """End a process and all that it started."""
    with contextlib.suppress(psutil.NoSuchProcess):
        root = psutil.Process(process.pid)
        doomed = [*root.children(recursive=True), root]
        for child in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(doomed, timeout=10)
    process.wait()


def skip_unless_the_port_is_free():
    if free_port(PORT) != PORT:
        pytest.skip(f"port {PORT} is in use, and the configuration names it")


def _get(url):
    with urllib.request.urlopen(url, timeout=10) as response:
        return response.read().decode()
