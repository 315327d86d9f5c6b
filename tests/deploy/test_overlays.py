"""What deploy/ ships is right, and is what its sources make."""

import os

import pytest
import yaml

from gllm_ray.cli import main
from gllm_ray.manifests.command import load_checks, validate_manifests
from gllm_ray.manifests.overlay import Overlay
from gllm_ray.strict_yaml import read_documents
from tests.deploy.manifests import (
    DEPLOY,
    OTHERS,
    OVERLAYS,
    ROOT,
    full_checks,
    needs_kubectl,
)

POD_FILES = [
    *(overlay / "rendered.yaml" for overlay in OVERLAYS),
    DEPLOY / "raycluster" / "raycluster.yaml",
    DEPLOY / "rayjob" / "batch" / "rayjob.yaml",
    DEPLOY / "rayjob" / "bench" / "rayjob.yaml",
]


def pod_templates(value):
    """Every pod template in an object."""
    if isinstance(value, dict):
        for key, child in value.items():
            if key == "template" and "spec" in child:
                yield child
            else:
                yield from pod_templates(child)
    elif isinstance(value, list):
        for child in value:
            yield from pod_templates(child)


def serve_config(overlay):
    """The text that KubeRay hands to Ray Serve."""
    (service,) = [
        item for item in read_documents(overlay / "rendered.yaml") if item["kind"] == "RayService"
    ]
    return service["spec"]["serveConfigV2"]


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_embeds_its_configuration_to_the_letter(overlay):
    config = Overlay(overlay).config
    assert config.resolve().parent == ROOT / "configs"
    assert serve_config(overlay) == config.read_text(encoding="utf-8")


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_a_budget_keeps_every_worker_that_is_always_there(overlay):
    objects = read_documents(overlay / "rendered.yaml")
    (service,) = [item for item in objects if item["kind"] == "RayService"]
    (budget,) = [item for item in objects if item["metadata"]["name"] == "gllm-ray-workers"]
    groups = service["spec"]["rayClusterConfig"]["workerGroupSpecs"]
    assert budget["spec"]["minAvailable"] == sum(group["minReplicas"] for group in groups)


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_a_rendered_overlay_keeps_our_own_schemas_and_rules(overlay, capsys):
    assert validate_manifests(overlay / "rendered.yaml", load_checks(None)), capsys.readouterr().err


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_a_rendered_overlay_keeps_the_definitions_of_kuberay_and_kubernetes(overlay, capsys):
    assert validate_manifests(overlay / "rendered.yaml", full_checks()), capsys.readouterr().err


@needs_kubectl
@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_nothing_rendered_is_out_of_date(overlay):
    assert Overlay(overlay).stale_files() == []


@needs_kubectl
@pytest.mark.parametrize("directory", OTHERS, ids=lambda path: path.name)
def test_a_cluster_and_the_jobs_keep_all_definitions(directory, capsys):
    assert validate_manifests(directory, full_checks()), capsys.readouterr().err


def add_components(overlay, names):
    """Have an overlay of `copy_of_deploy` use more components."""
    path = overlay / "kustomization.yaml"
    kustomization = yaml.safe_load(path.read_text("utf-8"))
    kustomization["components"] += [f"../../components/{name}" for name in names]
    path.write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    (overlay / "rendered.yaml").unlink()


@needs_kubectl
@pytest.mark.parametrize(
    "components", [["autoscaler", "incremental-upgrade"], ["gcs-ft-redis", "kueue"]]
)
def test_components_that_no_overlay_joins_go_together(components, copy_of_deploy, capsys):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    add_components(overlay, components)
    assert validate_manifests(overlay, full_checks()), capsys.readouterr().err


@needs_kubectl
def test_a_queue_leaves_it_to_kueue_when_the_service_is_suspended(copy_of_deploy):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    add_components(overlay, ["kueue"])
    (service,) = [item for item in Overlay(overlay).objects() if item["kind"] == "RayService"]
    assert service["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "gllm-ray"}
    assert "suspend" not in service["spec"]


@needs_kubectl
def test_the_gateway_of_an_incremental_upgrade_reaches_the_service_and_clients_reach_it(
    copy_of_deploy,
):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    add_components(overlay, ["autoscaler", "incremental-upgrade"])
    policies = [item for item in Overlay(overlay).objects() if item["kind"] == "NetworkPolicy"]
    gateway = {"gateway.networking.k8s.io/gateway-name": "gllm-ray-gateway"}
    assert (gateway, 8000) in allowed(policies, {"app": "gllm-ray"})
    assert allowed(policies, gateway) == [({"gllm-ray/client": "true"}, 80)]


def allowed(policies, labels):
    """Which pods of the namespace may ask pods with these labels, and at which port."""
    return [
        (peer["podSelector"]["matchLabels"], port["port"])
        for policy in policies
        if policy["spec"]["podSelector"]["matchLabels"] == labels
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        for port in rule.get("ports", ())
        if "podSelector" in peer
    ]


def test_every_component_is_in_an_overlay_or_in_the_test_above():
    used = {"autoscaler", "incremental-upgrade", "gcs-ft-redis", "kueue"}
    for overlay in OVERLAYS:
        kustomization = yaml.safe_load((overlay / "kustomization.yaml").read_text("utf-8"))
        used |= {path.rpartition("/")[2] for path in kustomization["components"]}
    assert {path.name for path in (DEPLOY / "components").iterdir()} == used


@pytest.mark.parametrize("path", POD_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_every_pod_runs_without_rights_that_it_does_not_need(path):
    templates = [pod for item in read_documents(path) for pod in pod_templates(item)]
    assert templates
    for pod in (template["spec"] for template in templates):
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert "automountServiceAccountToken" in pod
        for container in pod["containers"]:
            security = container["securityContext"]
            assert security["allowPrivilegeEscalation"] is False
            assert security["readOnlyRootFilesystem"] is True
            assert security["capabilities"] == {"drop": ["ALL"]}
            assert "memory" in container["resources"]["limits"]


@pytest.mark.parametrize("path", POD_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_shared_memory_holds_the_object_store_that_ray_makes(path):
    """Otherwise Ray puts it into /tmp, on a disk, and only says so in a log."""
    for pod in (pod["spec"] for item in read_documents(path) for pod in pod_templates(item)):
        for volume in pod.get("volumes", ()):
            if volume["name"] == "shm":
                size = gibibytes(volume["emptyDir"]["sizeLimit"])
                memory = gibibytes(pod["containers"][0]["resources"]["limits"]["memory"])
                assert size >= min(0.3 * memory, max(10, 0.95 * size))


def gibibytes(text):
    """The number before Gi."""
    return float(text.removesuffix("Gi"))


@needs_kubectl
def test_a_changed_configuration_is_told_until_it_is_rendered(copy_of_deploy, capsys):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    config = copy_of_deploy.parent / "configs" / "demo-kuberay.yaml"
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("max_replicas: 2", "max_replicas: 1"), encoding="utf-8")
    assert main(["validate", str(overlay)]) == 1
    message = "serve-config.yaml: out of date; run `gllm-ray manifests render"
    assert capsys.readouterr().err == f"{overlay}: {message} {overlay}`\n"
    assert main(["manifests", "render", str(overlay)]) == 0
    assert main(["validate", str(overlay)]) == 0


def test_a_wrong_configuration_is_not_rendered(copy_of_deploy, capsys):
    overlay = copy_of_deploy / "overlays" / "dev-cpu"
    config = copy_of_deploy.parent / "configs" / "demo-kuberay.yaml"
    before = (overlay / "serve-config.yaml").read_text(encoding="utf-8")
    text = config.read_text(encoding="utf-8")
    config.write_text(text.replace("num_stages", "num_stage"), encoding="utf-8")
    assert main(["manifests", "render", str(overlay)]) == 1
    assert "num_stage=2: unknown key; did you mean" in capsys.readouterr().err
    assert (overlay / "serve-config.yaml").read_text(encoding="utf-8") == before


def test_a_build_that_does_not_end_is_told(tmp_path, monkeypatch, capsys):
    kubectl = tmp_path / "kubectl"
    kubectl.write_text("#!/bin/sh\nexec sleep 60\n")
    kubectl.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setattr("gllm_ray.manifests.overlay._BUILD_TIMEOUT_S", 0.2)
    assert main(["validate", str(OVERLAYS[0])]) == 1
    assert "kubectl kustomize takes longer than 0.2 s" in capsys.readouterr().err


def test_without_kubectl_the_rendered_file_is_checked_and_that_is_said(monkeypatch, capsys):
    monkeypatch.setenv("PATH", "")
    assert main(["validate", str(OVERLAYS[0])]) == 0
    assert "as rendered.yaml has it, for there is no kubectl" in capsys.readouterr().out
    assert main(["validate", str(OTHERS[0])]) == 1
    assert "install kubectl" in capsys.readouterr().err
