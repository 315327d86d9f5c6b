"""What the alerts fire at, by Prometheus' own evaluation where promtool is installed."""

import shutil
import subprocess

import pytest
import yaml

from gllm_ray.strict_yaml import read_documents
from tests.deploy.manifests import DEPLOY

MONITORING = DEPLOY / "components" / "monitoring"
JOB = 'job="llm/gllm-ray",namespace="llm"'
HEAD, WORKER = (f'up{{{JOB},container="{name}"}}' for name in ("ray-head", "ray-worker"))
DEPLOYMENT = f'{JOB},application="a",deployment="my-model"'
APPLICATION = f'ray_serve_application_status{{{JOB},application="a"}}'
EXISTS = f"ray_serve_deployment_status{{{DEPLOYMENT}}}"
WANTED = f"ray_serve_autoscaling_target_replicas{{{DEPLOYMENT}}}"
ALWAYS_1, ALWAYS_0 = "1x60", "0x60"

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool, of Prometheus, is missing"
)


def healthy(replica):
    return f'ray_serve_deployment_replica_healthy{{{DEPLOYMENT},replica="{replica}"}}'


def ended(reason):
    return f'ray_gllm_ray_request_success_total{{{JOB},model_name="m",finished_reason="{reason}"}}'


def replicas_that_come_and_go(num):
    """One after the other, none is left."""
    return {healthy(i): "_ " * 5 * i + "1x4 stale" for i in range(num)}


# The series, minute by minute, and the alerts that fire after 40 minutes.
CASES = {
    "a service that answers": (
        {HEAD: ALWAYS_1, APPLICATION: "6x60", EXISTS: "6x60", WANTED: "1x60", healthy(0): "1x60"},
        set(),
    ),
    "the head is down, and a worker lives": (
        {HEAD: ALWAYS_0, WORKER: ALWAYS_1},
        {"GllmRayHeadSilent"},
    ),
    "no pod has ever been there": ({}, {"GllmRayHeadSilent"}),
    "nothing is deployed": ({HEAD: ALWAYS_1, WORKER: ALWAYS_1}, {"GllmRayHeadSilent"}),
    "no replica has ever been healthy": (
        {HEAD: ALWAYS_1, APPLICATION: "5x60", EXISTS: "3x60", WANTED: "1x60"},
        {"GllmRayNoHealthyReplica"},
    ),
    "the only replica is unhealthy": (
        {HEAD: ALWAYS_1, APPLICATION: "2x60", EXISTS: "2x60", WANTED: "1x60", healthy(0): "0x60"},
        {"GllmRayNoHealthyReplica"},
    ),
    "it has scaled to zero": (
        {HEAD: ALWAYS_1, APPLICATION: "6x60", EXISTS: "6x60", WANTED: "0x60"},
        set(),
    ),
    "replicas die one after the other": (
        {HEAD: ALWAYS_1, APPLICATION: "2x60", EXISTS: "2x60", WANTED: "1x60"}
        | replicas_that_come_and_go(7),
        {"GllmRayNoHealthyReplica", "GllmRayReplicasRestart"},
    ),
    "a pipeline is under repair": (
        {
            HEAD: ALWAYS_1,
            APPLICATION: "6x60",
            f'ray_gllm_ray_pipeline_repairing{{{DEPLOYMENT},replica="0"}}': "0x30 1x30",
        },
        {"GllmRayPipelineStandsStill"},
    ),
    "blamed requests": (
        {HEAD: ALWAYS_1, APPLICATION: "6x60", ended("stop"): "0+9x60", ended("blamed"): "0+1x60"},
        {"GllmRayRequestsFail"},
    ),
}


@pytest.fixture
def rules():
    (manifest,) = read_documents(MONITORING / "prometheusrule.yaml")
    return manifest["spec"]


@needs_promtool
@pytest.mark.parametrize(("series", "firing"), CASES.values(), ids=CASES)
def test_an_alert_fires_when_it_should_and_no_other_does(series, firing, rules, tmp_path):
    (tmp_path / "rules.yaml").write_text(yaml.safe_dump(rules))
    test = {
        "rule_files": ["rules.yaml"],
        "tests": [
            {
                "interval": "1m",
                "input_series": [{"series": k, "values": v} for k, v in series.items()],
                "promql_expr_test": [
                    {
                        "expr": 'group by (alertname) (ALERTS{alertstate="firing"})',
                        "eval_time": "40m",
                        "exp_samples": [
                            {"labels": f'{{alertname="{name}"}}', "value": 1} for name in firing
                        ],
                    }
                ],
            }
        ],
    }
    (tmp_path / "test.yaml").write_text(yaml.safe_dump(test))
    result = subprocess.run(
        ["promtool", "test", "rules", tmp_path / "test.yaml"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout + result.stderr


def test_no_alert_depends_on_what_a_deployment_is_called(rules):
    expressions = [rule["expr"] for group in rules["groups"] for rule in group["rules"]]
    assert not [text for text in expressions if "deployment=" in text]
