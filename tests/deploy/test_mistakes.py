"""Realistic mistakes in manifests: each is told with its file, its key and how to mend it."""

import pytest

from gllm_ray.manifests.command import load_checks, validate_manifests
from tests.deploy.manifests import DEPLOY, full_checks, needs_kubectl

CLUSTER = "spec.rayClusterConfig"
WORKERS = f"{CLUSTER}.workerGroupSpecs[0]"
POD = f"{WORKERS}.template.spec"
ARGS = "spec.serveConfigV2: applications[0].args"
SERVE_8B, SERVE_70B = "llama8b-1node", "llama70b-2node"

# Overlay, what is there, what is written instead, the key that is told, and how to mend it. Our own
# schemas and rules tell of these.
OURS = [
    # Misspelt and misplaced keys of KubeRay.
    (
        SERVE_8B,
        "  serveConfigV2: |",
        "  serveConfigv2: |",
        "spec.serveConfigv2",
        "did you mean serve",
    ),
    (
        SERVE_8B,
        "    workerGroupSpecs:",
        "    workerGroupSpec:",
        f"{CLUSTER}.workerGroupSpec",
        "mean w",
    ),
    (
        SERVE_8B,
        "      maxReplicas: 4",
        "      maxReplica: 4",
        f"{WORKERS}.maxReplica",
        "maxReplicas",
    ),
    (
        SERVE_8B,
        "      minReplicas: 1",
        '      minReplicas: "1"',
        f"{WORKERS}.minReplicas",
        "an integer",
    ),
    (SERVE_8B, "ray.io/v1", "ray.io/v1alpha1", "apiVersion", "must be ray.io/v1"),
    (
        SERVE_8B,
        "      version: v2",
        "      version: v3",
        f"{CLUSTER}.autoscalerOptions.version",
        "v1 or v2",
    ),
    (
        SERVE_8B,
        "  name: gllm-ray\nspec:\n  excl",
        f"  name: {'g' * 48}\nspec:\n  excl",
        "metadata.name",
        "47",
    ),
    (
        SERVE_8B,
        "initializing-timeout: 30m",
        "initializing-timeout: 30 min",
        "metadata.annotations.ray.io/initializing-timeout",
        "a duration such as 30m",
    ),
    # What the definitions take and the operator refuses, or does not.
    (
        SERVE_8B,
        "type: NewCluster",
        "type: Rolling",
        "spec.upgradeStrategy.type",
        "None, NewCluster or",
    ),
    (
        SERVE_8B,
        "type: NewCluster",
        "type: NewClusterWithIncrementalUpgrade",
        "spec.upgradeStrategy.clusterUpgradeOptions",
        "required",
    ),
    (SERVE_8B, "    rayVersion: 2.60.0\n", "", f"{CLUSTER}.rayVersion", "at least 2.52"),
    (
        SERVE_8B,
        "rayVersion: 2.60.0",
        "rayVersion: 2.49.2",
        f"{CLUSTER}.rayVersion",
        "at least 2.52",
    ),
    (
        SERVE_8B,
        "      mode: token",
        "      mode: tokens",
        f"{CLUSTER}.authOptions.mode",
        "or token",
    ),
    (
        SERVE_8B,
        "    authOptions:\n      mode: token\n",
        "",
        f"{CLUSTER}.authOptions",
        "required, but not given",
    ),
    (
        SERVE_8B,
        "      minReplicas: 1",
        "      minReplicas: 5",
        f"{WORKERS}.minReplicas",
        "<= maxReplicas=4",
    ),
    (SERVE_8B, "      replicas: 1", "      replicas: 5", f"{WORKERS}.replicas", "to maxReplicas=4"),
    (
        SERVE_8B,
        "          automountServiceAccountToken: true",
        "          automountServiceAccountToken: false",
        f"{CLUSTER}.headGroupSpec.template.spec.automountServiceAccountToken",
        "must be true",
    ),
    (
        SERVE_8B,
        '        num-cpus: "0"',
        '        num-cpus: "$CPUS"',
        f"{CLUSTER}.headGroupSpec.rayStartParams.num-cpus",
        "must be a whole number",
    ),
    (
        SERVE_8B,
        "  name: gllm-ray\nspec:\n  excl",
        "  name: gllm-ray\n  labels: {kueue.x-k8s.io/queue-name: q}\nspec:\n  excl",
        f"{CLUSTER}.enableInTreeAutoscaling",
        "must be false beside the label",
    ),
    (
        SERVE_70B,
        "        valueFrom:\n          secretKeyRef:\n            key: password\n            name:",
        "        value: secret #",
        f"{CLUSTER}.gcsFaultToleranceOptions.redisPassword.value",
        "valueFrom.secretKeyRef",
    ),
    (
        "mixed-gpus",
        "      rayStartParams: {}",
        '      rayStartParams: {num-gpus: "1"}',
        f"{WORKERS}.resources",
        "beside rayStartParams.num-gpus",
    ),
    # The configuration in it.
    (
        SERVE_8B,
        "max_model_len: 16",
        "max_model_length: 16",
        f"{ARGS}.model.max_model_length",
        "max_model_len?",
    ),
    (
        SERVE_8B,
        "        route_prefix: /",
        "        route_prfix: /",
        "applications[0].route_prfix",
        "route_prefix?",
    ),
    (
        SERVE_8B,
        "            min_replicas: 1",
        "            min_replicas: 9",
        f"{ARGS}.deployment.min_replicas",
        "<= ",
    ),
    (
        SERVE_8B,
        "      host: 0.0.0.0",
        "      host: 127.0.0.1",
        "spec.serveConfigV2: http_options.host",
        "0.0.0.0",
    ),
    (
        SERVE_8B,
        "      port: 8000\n    app",
        "      port: 9000\n    app",
        f"{POD}.containers[0].ports[0].containerPort",
        "9000",
    ),
    (SERVE_8B, "    applications:", "    applications: [", "spec.serveConfigV2:", "while parsing"),
    # What does not go with what.
    (
        SERVE_8B,
        "      maxReplicas: 4",
        "      maxReplicas: 3",
        f"{CLUSTER}.workerGroupSpecs",
        "hold 3 of the 4",
    ),
    (
        SERVE_70B,
        'nvidia.com/gpu: "4"\n              requests',
        'nvidia.com/gpu: "2"\n              requests',
        f"{CLUSTER}.workerGroupSpecs",
        "hold 0 of the 1 replicas of application 'llama70b'",
    ),
    (
        SERVE_70B,
        "placement_strategy: PACK",
        "placement_strategy: STRICT_PACK",
        f"{CLUSTER}.workerGroupSpecs",
        "(STRICT_PACK)",
    ),
    (
        "mixed-gpus",
        "accelerator_type: L40S",
        "accelerator_type: L40",
        f"{CLUSTER}.workerGroupSpecs",
        "accelerator_type:L40 in",
    ),
    (
        "dev-cpu",
        "cpus_per_stage: 0.4",
        "cpus_per_stage: 1",
        f"{CLUSTER}.workerGroupSpecs",
        "2.2 CPU",
    ),
    (
        SERVE_70B,
        "          terminationGracePeriodSeconds: 330\n",
        "",
        f"{POD}.terminationGracePeriodSeconds",
        "must be at least 320",
    ),
    (
        SERVE_8B,
        "  rayClusterDeletionDelaySeconds: 330",
        "  rayClusterDeletionDelaySeconds: 10",
        "spec.rayClusterDeletionDelaySeconds",
        "must be at least 60",
    ),
    # Beside the service.
    (
        SERVE_8B,
        "  minAvailable: 1",
        "  maxUnavailable: 1",
        "spec.maxUnavailable",
        "use minAvailable",
    ),
    (SERVE_8B, "  minAvailable: 1", "  minAvailable: 50%", "spec.minAvailable", "a number of pods"),
    (
        SERVE_8B,
        "interval: 15s",
        "interval: 15 s",
        "spec.podMetricsEndpoints[0].interval",
        "such as 30s",
    ),
    (
        SERVE_8B,
        "      for: 5m",
        "      fro: 5m",
        "spec.groups[0].rules[0].fro",
        "did you mean for?",
    ),
]

# KubeRay's definitions and Kubernetes' own schemas tell of these.
SCHEMAS = [
    (
        SERVE_8B,
        "            image: registry",
        "            imagee: x\n            image: registry",
        f"{POD}.containers[0].imagee",
        "image?",
    ),
    (
        SERVE_8B,
        "terminationGracePeriodSeconds: 330",
        "terminationGracePeriodSecond: 330\n          terminationGracePeriodSeconds: 330",
        f"{POD}.terminationGracePeriodSecond",
        "Seconds?",
    ),
    (
        SERVE_8B,
        "                memory: 32Gi",
        "                memory: 32 GB",
        f"{POD}.containers[0].resources.limits.memory",
        "text that matches",
    ),
    (
        SERVE_8B,
        "- containerPort: 8000\n              name: serve",
        '- containerPort: "8000"\n              name: serve',
        f"{CLUSTER}.headGroupSpec.template.spec.containers[0].ports[3].containerPort",
        "an integer",
    ),
    (
        SERVE_8B,
        "          - effect: NoSchedule",
        "          - effects: NoSchedule",
        f"{POD}.tolerations[0].effects",
        "effect?",
    ),
    (
        SERVE_8B,
        "  excludeHead",
        "  managedBy: me\n  excludeHead",
        "spec.managedBy",
        "must be either 'ray.io/kuberay-operator'",
    ),
    (
        SERVE_8B,
        "  podSelector:",
        "  podSelectr:",
        "spec.ingress[2].from[0].podSelectr",
        "podSelector?",
    ),
    (
        SERVE_8B,
        "    requests:\n      storage",
        "    request:\n      storage",
        "spec.resources.request",
        "requests?",
    ),
    (
        SERVE_70B,
        "          tcpSocket:\n            port: redis",
        "          tcpSocket: {}",
        "spec.template.spec.containers[0].readinessProbe.tcpSocket.port",
        "required",
    ),
]


def lines_told(file, old, new, checks, capsys):
    """What is said about a file in which a text is replaced once."""
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")
    assert not validate_manifests(file, checks)
    return capsys.readouterr().err.splitlines()


def tells(line, file, key, mend):
    """Whether a line names the file, then the key, then what to write."""
    place, _, rest = line.partition(key)
    return line.startswith(f"{file}: ") and (place.endswith(" ")) and mend in rest


@pytest.mark.parametrize(("overlay", "old", "new", "key", "mend"), OURS)
def test_a_mistake_is_told_once_where_nothing_is_installed(
    overlay, old, new, key, mend, copy_of_deploy, capsys
):
    file = copy_of_deploy / "overlays" / overlay / "rendered.yaml"
    lines = lines_told(file, old, new, load_checks(None), capsys)
    assert [line for line in lines if tells(line, file, key, mend)], lines


@pytest.mark.parametrize(("overlay", "old", "new", "key", "mend"), OURS + SCHEMAS)
def test_a_mistake_is_told_by_all_checks_together(
    overlay, old, new, key, mend, copy_of_deploy, capsys
):
    file = copy_of_deploy / "overlays" / overlay / "rendered.yaml"
    lines = lines_told(file, old, new, full_checks(), capsys)
    assert [line for line in lines if tells(line, file, key, mend)], lines


KUSTOMIZE = [
    (
        "kustomization.yaml",
        "components:",
        "component:",
        "kubectl kustomize",
        "unknown field",
    ),
    ("kustomization.yaml", "../../base", "../../bases", "kubectl kustomize", "bases"),
    (
        "kustomization.yaml",
        "demo-kuberay.yaml",
        "demo-kubray.yaml",
        "demo-kubray.yaml",
        "No such file",
    ),
    ("rendered.yaml", "maxReplicas: 1", "maxReplicas: 2", "rendered.yaml", "out of date; run"),
    (
        "serve-config.yaml",
        "num_stages: 2",
        "num_stages: 1",
        "serve-config.yaml",
        "out of date; run",
    ),
]


@needs_kubectl
@pytest.mark.parametrize(("name", "old", "new", "key", "mend"), KUSTOMIZE)
def test_a_mistake_in_an_overlay_is_told(name, old, new, key, mend, copy_of_deploy, capsys):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    file = overlay / name
    file.write_text(file.read_text("utf-8").replace(old, new), encoding="utf-8")
    assert not validate_manifests(overlay, load_checks(None))
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(str(overlay))
    assert key in line
    assert mend in line


@needs_kubectl
def test_a_merge_patch_that_replaces_the_list_of_workers_is_told(copy_of_deploy, capsys):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    (overlay / "rendered.yaml").unlink()
    file = overlay / "kustomization.yaml"
    patch = (
        "patches:\n  - patch: |\n      apiVersion: ray.io/v1\n      kind: RayService\n"
        "      metadata: {name: gllm-ray}\n      spec: {rayClusterConfig: {workerGroupSpecs: "
        "[{groupName: workers, maxReplicas: 2}]}}\n"
    )
    file.write_text(file.read_text("utf-8").replace("patches:\n", patch), encoding="utf-8")
    assert not validate_manifests(overlay, load_checks(None))
    assert f"{WORKERS}.template: required, but not given" in capsys.readouterr().err


def test_every_list_of_mistakes_is_of_shipped_files():
    assert {overlay for overlay, *_ in OURS + SCHEMAS} == {
        path.name for path in (DEPLOY / "overlays").iterdir()
    }


def test_a_kind_that_nobody_knows_is_told_unless_somebody_may(copy_of_deploy, capsys):
    file = copy_of_deploy / "overlays" / "dev-cpu" / "rendered.yaml"
    text = file.read_text(encoding="utf-8")
    route = "---\napiVersion: gateway.networking.k8s.io/v1\nkind: HTTPRoute\nmetadata: {name: r}\n"
    file.write_text(text + route, encoding="utf-8")
    assert validate_manifests(file, full_checks())
    assert capsys.readouterr().out.endswith("not checked: HTTPRoute r\n")
    for kind, version in (("ServiceAccount", "v1"), ("RayService", "ray.io/v1")):
        file.write_text(text.replace(f"kind: {kind}\n", "kind: Misspelt\n", 1), encoding="utf-8")
        assert not validate_manifests(file, full_checks())
        assert f"kind='Misspelt': is none of {version}\n" in capsys.readouterr().err
