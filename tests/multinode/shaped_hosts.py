"""Two hosts on this machine: network namespaces that a slow link joins, with a Ray node in each."""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[2]
ADDRESSES = ("10.201.7.1", "10.201.7.2")
_PORT = 6479
_START_TIMEOUT_S = 120


class ShapedHosts:
    """As a context manager; what it made is gone at the end.

    Args:
        rate: Of the link in each direction, as `tc` spells it.
    """

    def __init__(self, rate):
        self._names = [f"gllm{os.getpid()}{end}" for end in "ab"]
        self._rate = rate
        self._directory = Path(tempfile.mkdtemp(prefix="ray", dir="/tmp"))
        self._nodes = []

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._end()

    def join(self):
        """Make the hosts and their link.

        Raises:
            CalledProcessError: The machine does not let us; tells what of it.
        """
        first, second = self._names
        for name in self._names:
            _run("ip", "netns", "add", name)
        _run(
            *("ip", "link", "add", "eth1", "netns", first, "type", "veth"),
            *("peer", "name", "eth1", "netns", second),
        )
        for name, address in zip(self._names, ADDRESSES, strict=True):
            # Nobody answers DNS here; with no server named, look-ups of peers fail at once.
            files = self._files_of(name)
            files.mkdir(parents=True)
            (files / "resolv.conf").touch()
            _run("ip", "-n", name, "address", "add", f"{address}/24", "dev", "eth1")
            for device in ("lo", "eth1"):
                _run("ip", "-n", name, "link", "set", device, "up")
            # Ray takes the address from which the Internet would be reached for a driver's.
            _run("ip", "-n", name, "route", "add", "default", "dev", "eth1")
            shape = ("root", "tbf", "rate", self._rate, "burst", "32kb", "latency", "400ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", "eth1", *shape)

    def start_ray(self):
        """Start a node on each host, whose resources are named after it: host_0 and host_1."""
        head = ["--head", f"--port={_PORT}", f"--temp-dir={self._directory}"]
        self._start_node(0, [*head, "--include-dashboard=false", "--num-cpus=3"])
        self._start_node(1, [f"--address={ADDRESSES[0]}:{_PORT}", "--num-cpus=1"])

    def run(self, module, directory, timeout_s):
        """Run a module on the first host, for files in a directory; returns what it printed."""
        address = f"{ADDRESSES[0]}:{_PORT}"
        done = subprocess.run(
            [*self._inside(0), sys.executable, "-m", module, str(directory), address],
            cwd=ROOT,
            env=self._environment(),
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    def _start_node(self, host, options):
        command = [
            *(*self._inside(host), sys.executable, "-m", "ray.scripts.scripts", "start", "--block"),
            *(*options, f"--node-ip-address={ADDRESSES[host]}", "--disable-usage-stats"),
            *(f'--resources={{"host_{host}": 1}}', f"--object-store-memory={100 * 2**20}"),
        ]
        log = (self._directory / f"host_{host}.log").open("wb")
        node = subprocess.Popen(command, env=self._environment(), stdout=log, stderr=log)
        self._nodes.append(node)
        deadline_s = time.monotonic() + _START_TIMEOUT_S
        while b"Ray runtime started" not in Path(log.name).read_bytes():
            told = Path(log.name).read_text()[-2000:]
            assert node.poll() is None, told
            assert time.monotonic() < deadline_s, told
            time.sleep(0.2)
        log.close()

    def _files_of(self, name):
        """What `ip netns exec` lays over /etc."""
        return Path("/etc/netns", name)

    def _inside(self, host):
        return ["ip", "netns", "exec", self._names[host]]

    def _environment(self):
        return os.environ | {"RAY_AUTH_MODE": "disabled", "RAY_memory_monitor_refresh_ms": "0"}

    def _end(self):
        for node in self._nodes:
            if psutil.pid_exists(node.pid):
                root = psutil.Process(node.pid)
                family = [*root.children(recursive=True), root]
                for process in family:
                    process.kill()
                psutil.wait_procs(family, timeout=10)
            node.wait()
        for name in self._names:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)
            shutil.rmtree(self._files_of(name), ignore_errors=True)
        shutil.rmtree(self._directory, ignore_errors=True)


def _run(*command):
    subprocess.run(command, check=True, capture_output=True)
