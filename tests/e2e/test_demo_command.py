"""`make demo` as a user sees it."""

import signal
import subprocess
import sys
import threading

import psutil

from tests.e2e.conftest import REPOSITORY

TIMEOUT_S = 110


def test_ctrl_c_ends_every_process_of_the_demo():
    demo = subprocess.Popen(
        [sys.executable, "-m", "gllm_ray.demo", "--port", "0"],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    watchdog = threading.Timer(TIMEOUT_S, demo.terminate)
    watchdog.start()
    output = ""
    for line in demo.stdout:
        output += line
        if "until Ctrl-C" in line:
            break
    started = psutil.Process(demo.pid).children(recursive=True)
    demo.send_signal(signal.SIGINT)
    output += demo.stdout.read()
    status = demo.wait()
    watchdog.cancel()

    assert status == 0, output
    for shown in ("starting Ray", "loading shard 0", "loading shard 1", "ready", "TTFT", "curl"):
        assert shown in output
    assert len(started) > 5  # Ray, Serve, the stages
    _, alive = psutil.wait_procs(started, timeout=5)
    assert not alive
