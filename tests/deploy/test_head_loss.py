"""What the component gcs-ft-redis is for: the service outlives its head."""

import json
import time
import urllib.request

import pytest

from tests.deploy.local_cluster import LocalCluster, skip_unless_the_port_is_free

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


def stages(cluster):
    """Processes that hold the model."""
    return {pid for pid, title in cluster.workers_processes().items() if "StageActor" in title}


def test_a_lost_head_comes_back_to_the_same_stages(redis):
    skip_unless_the_port_is_free()
    address, password = redis
    with LocalCluster(
        worker_cpus=[2],
        head_options=[f"--redis-password={password}"],
        head_environment={"RAY_REDIS_ADDRESS": address},
    ) as cluster:
        base_url = cluster.deploy_overlay("dev-cpu")
        before = stages(cluster)
        assert len(before) == 2
        cluster.kill_head()
        assert cluster.status_of("/api/version") == 0
        cluster.start_head()
        cluster.wait_until_running()
        assert stages(cluster) == before
        deadline_s = time.monotonic() + 60
        while not answers(base_url):
            assert time.monotonic() < deadline_s
            time.sleep(1)


def answers(base_url):
    body = {"model": "gllm-ray-demo", "prompt": "def f(", "max_tokens": 4}
    request = urllib.request.Request(
        f"{base_url}/v1/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=20) as response:
            return json.load(response)["usage"]["completion_tokens"] > 0
    except OSError:
        return False
