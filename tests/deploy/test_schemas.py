"""Our schemas of KubeRay's kinds have the keys of KubeRay's own."""

import pytest

from gllm_ray.manifests import ray_cluster, ray_kinds
from tests.deploy.manifests import crd_dir

SPEC = ("properties", "spec", "properties")
CLUSTER = (*SPEC, "rayClusterConfig", "properties")
WORKER = (*CLUSTER, "workerGroupSpecs", "items", "properties")
STRATEGY = (*SPEC, "upgradeStrategy", "properties")
PLACES = [
    (ray_kinds.RayServiceSpec, "RayService", SPEC),
    (ray_kinds.RayJobSpec, "RayJob", SPEC),
    (ray_kinds.DeletionStrategy, "RayJob", (*SPEC, "deletionStrategy", "properties")),
    (ray_kinds.UpgradeStrategy, "RayService", STRATEGY),
    (
        ray_kinds.ClusterUpgradeOptions,
        "RayService",
        (*STRATEGY, "clusterUpgradeOptions", "properties"),
    ),
    (ray_cluster.RayClusterSpec, "RayCluster", SPEC),
    (ray_cluster.RayClusterSpec, "RayService", CLUSTER),
    (ray_cluster.HeadGroup, "RayService", (*CLUSTER, "headGroupSpec", "properties")),
    (ray_cluster.WorkerGroup, "RayService", WORKER),
    (ray_cluster.AuthOptions, "RayService", (*CLUSTER, "authOptions", "properties")),
    (ray_cluster.AutoscalerOptions, "RayService", (*CLUSTER, "autoscalerOptions", "properties")),
    (
        ray_cluster.GcsFaultToleranceOptions,
        "RayService",
        (*CLUSTER, "gcsFaultToleranceOptions", "properties"),
    ),
    (ray_cluster.ClusterUpgradeStrategy, "RayCluster", (*SPEC, "upgradeStrategy", "properties")),
]


@pytest.fixture(scope="module")
def make_definitions():
    module = pytest.importorskip(
        "gllm_ray.manifests.custom_resources", reason="gllm_ray[deploy] is not installed"
    )
    return module.CustomResources


@pytest.fixture(scope="module")
def definitions(make_definitions):
    return make_definitions(crd_dir())


@pytest.mark.parametrize(("model", "kind", "place"), PLACES)
def test_the_keys_are_those_of_the_definition(model, kind, place, definitions):
    node = definitions.schema("ray.io/v1", kind)
    for key in place:
        node = node[key]
    assert {field.alias for field in model.model_fields.values()} == set(node)


@pytest.mark.parametrize("text", ["", "404: Not Found", "spec: {versions: [v1]}", "a: b: c"])
def test_a_file_that_is_no_definition_is_told(text, make_definitions, tmp_path):
    file = tmp_path / "ray.io_rayservices.yaml"
    file.write_text(text)
    item = {"apiVersion": "ray.io/v1", "kind": "RayService"}
    lines = make_definitions(tmp_path).find_mistakes(item)
    assert lines == [f"{file}: must be a custom resource definition"]
