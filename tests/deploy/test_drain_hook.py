"""The preStop hook's script, with commands in place of Ray's; test_drain.py has what Ray does."""

import os
import subprocess
import time

import pytest

from tests.deploy.manifests import DEPLOY

HOOK = DEPLOY / "docker" / "gllm-ray-drain"


@pytest.fixture
def raylet():
    with subprocess.Popen(["sleep", "60"]) as process:
        yield process
        process.kill()


@pytest.fixture
def start_hook(tmp_path, raylet):
    """Start the hook; `ray` fails so many times first, and tells of each call."""

    def start(grace_s, *, num_failures):
        calls = tmp_path / "calls"
        calls.touch()
        ray = f'echo "$@" >> {calls}\n[ "$(wc -l < {calls})" -gt {num_failures} ]\n'
        pidof, sleep = f"echo {raylet.pid}\n", "exec /bin/sleep 0.1\n"
        for name, script in (("ray", ray), ("pidof", pidof), ("sleep", sleep)):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}")
            (tmp_path / name).chmod(0o755)
        path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
        environment = os.environ | {"PATH": path, "RAY_ADDRESS": "head:6379"}
        return subprocess.Popen(["bash", HOOK, str(grace_s)], env=environment), calls

    return start


def test_the_hook_asks_a_head_that_is_away_again_and_waits_for_the_node_to_empty(
    start_hook, raylet
):
    hook, calls = start_hook(60, num_failures=1)
    with hook:
        while calls.read_text().count("drain-node") < 2:
            assert hook.poll() is None
            time.sleep(0.05)
        time.sleep(0.2)
        assert hook.poll() is None
        raylet.kill()
        raylet.wait()
        hook.wait(timeout=5)


def test_the_hook_keeps_the_pod_for_all_its_time_when_no_head_ever_answers(start_hook):
    start_s = time.monotonic()
    hook, _ = start_hook(3, num_failures=99)
    with hook:
        assert hook.wait(timeout=20) == 0
    assert time.monotonic() - start_s > 2  # bash counts whole seconds
