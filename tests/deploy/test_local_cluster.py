"""What deploy/ hands to Ray, for real: on two nodes of this machine, with a token."""

import json
import re
import shlex
import time
import urllib.request

import openai
import pytest

from gllm_ray.serving.observability import METRIC_PREFIX, METRICS
from gllm_ray.strict_yaml import read_documents
from tests.deploy.local_cluster import LocalCluster, skip_unless_the_port_is_free
from tests.deploy.manifests import DEPLOY

RARE = {"num_preemptions_total"}  # counted when it first happens

pytestmark = [pytest.mark.chaos, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def cluster():
    skip_unless_the_port_is_free()
    with LocalCluster(worker_cpus=[2]) as cluster:
        yield cluster


@pytest.fixture(scope="module")
def service(cluster):
    return cluster.deploy_overlay("dev-cpu")


def _job_entrypoint():
    (job,) = read_documents(DEPLOY / "rayjob" / "bench" / "rayjob.yaml")
    return job["spec"]["entrypoint"]


def test_nobody_without_the_token_gets_at_the_cluster(cluster):
    assert cluster.status_of("/api/serve/applications/") == 200
    assert cluster.status_of("/api/serve/applications/", token=False) == 401
    assert cluster.status_of("/api/jobs/", token=False) == 401


def test_the_text_in_serve_config_v2_is_served(service):
    with openai.OpenAI(base_url=f"{service}/v1", api_key="none", max_retries=0) as client:
        answers = [
            client.completions.create(
                model="gllm-ray-demo",
                prompt="def area(" * 12,
                max_tokens=16,
                temperature=0,
                extra_body={"ignore_eos": True},
            )
            for _ in range(2)
        ]
    assert answers[0].choices[0].text == answers[1].choices[0].text
    assert answers[0].usage.completion_tokens == 16
    with urllib.request.urlopen(f"{service}/server_info", timeout=10) as response:
        assert len(json.load(response)["stages"]) == 2


def test_the_entrypoint_of_the_benchmark_runs_as_a_job(service, cluster):
    entrypoint = _job_entrypoint()
    assert entrypoint.count("http://gllm-ray-serve-svc:8000") == 1
    here = entrypoint.replace("http://gllm-ray-serve-svc:8000", service)
    result = cluster.run(
        *("ray", "job", "submit", "--address", cluster.dashboard, "--", *shlex.split(here)),
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "succeeded" in result.stdout
    assert re.search(r"^\| serve \| .* \| 64, 8/s", result.stdout, re.MULTILINE), result.stdout


def test_prometheus_gets_every_metric_of_the_service(service, cluster):
    deadline_s = time.monotonic() + 60
    wanted = {f"ray_{METRIC_PREFIX}{name}" for name in METRICS if name not in RARE}
    while missing := wanted - _families(cluster.metrics()):
        assert time.monotonic() < deadline_s, missing
        time.sleep(2)


def _families(text):
    """The names of metrics, without the suffixes of a histogram's series."""
    names = {line.partition("{")[0] for line in text.splitlines() if not line.startswith("#")}
    return {re.sub(r"_(bucket|sum|count)$", "", name) for name in names}
