"""Whether pods hold pipelines."""

import pytest

from gllm_ray.manifests.capacity import (
    Demand,
    cluster_nodes,
    find_capacity_mistakes,
    node_resources,
    parse_quantity,
)
from gllm_ray.manifests.ray_cluster import RayClusterSpec, WorkerGroup


def pod(**limits):
    resources = {"limits": {key.replace("gpu", "nvidia.com/gpu"): v for key, v in limits.items()}}
    return {"spec": {"containers": [{"name": "ray", "image": "x", "resources": resources}]}}


def worker(replicas=1, *, most=None, name="w", **limits):
    return {
        "groupName": name,
        "replicas": replicas,
        "maxReplicas": most or replicas,
        "template": pod(**limits),
    }


def cluster(*groups, autoscaling=False):
    return RayClusterSpec.model_validate(
        {
            "headGroupSpec": {"template": pod(cpu="2"), "rayStartParams": {"num-cpus": "0"}},
            "workerGroupSpecs": list(groups),
            "authOptions": {"mode": "disabled"},
            "enableInTreeAutoscaling": autoscaling,
        }
    )


def demand(num_stages, *, strategy="PACK", num_replicas=1, gpus=1.0, name="a"):
    stage = {"CPU": 1.0, "GPU": gpus}
    return Demand(
        name=name,
        num_replicas=num_replicas,
        bundles=[{"CPU": 0.2}, *[stage] * num_stages],
        strategy=strategy,
    )


@pytest.mark.parametrize(
    ("groups", "wanted"),
    [
        ([worker(2, cpu="8", gpu="4")], demand(8)),
        ([worker(2, cpu="8", gpu="4")], demand(4, num_replicas=2, strategy="STRICT_PACK")),
        ([worker(9, cpu="2", gpu="1")], demand(8, strategy="STRICT_SPREAD")),
        ([worker(1, cpu="8", gpu="1")], demand(2, gpus=0.5)),
        (
            [worker(1, cpu="4", gpu="2"), worker(1, cpu="8", gpu="4", name="large")],
            demand(4, strategy="STRICT_PACK"),
        ),
    ],
)
def test_what_fits_is_no_mistake(groups, wanted):
    assert find_capacity_mistakes(cluster(*groups), [wanted]) == []


@pytest.mark.parametrize(
    ("groups", "wanted", "num_placed"),
    [
        ([worker(2, cpu="8", gpu="4")], demand(9), 0),
        ([worker(2, cpu="8", gpu="4")], demand(8, strategy="STRICT_PACK"), 0),
        ([worker(2, cpu="8", gpu="4")], demand(3, num_replicas=3), 2),
        ([worker(8, cpu="2", gpu="1")], demand(8, strategy="STRICT_SPREAD"), 0),
        ([worker(2, cpu="4", gpu="4")], demand(8), 0),
        ([], demand(1), 0),
    ],
)
def test_what_does_not_fit_is_told_with_how_many_do(groups, wanted, num_placed):
    (line,) = find_capacity_mistakes(cluster(*groups), [wanted])
    assert f"hold {num_placed} of the {wanted.num_replicas} replicas of application 'a'" in line


def test_what_must_lie_together_is_placed_first():
    nodes = [worker(cpu="8", gpu="3"), worker(cpu="4", gpu="4", name="few-cpus")]
    spread = demand(4, name="any")
    together = demand(4, name="one", gpus=0.5, strategy="STRICT_PACK")
    assert find_capacity_mistakes(cluster(*nodes), [spread, together]) == []


def test_of_what_must_lie_together_the_largest_is_placed_first():
    nodes = [worker(cpu="8", gpu="4"), worker(cpu="8", gpu="3", name="small")]
    pairs = demand(2, name="pairs", num_replicas=2, strategy="STRICT_PACK")
    large = demand(3, name="large", strategy="STRICT_PACK")
    assert find_capacity_mistakes(cluster(*nodes), [pairs, large]) == []


def test_an_autoscaled_group_counts_with_its_most_pods_and_any_other_with_those_it_has():
    group = worker(1, most=4, cpu="1", gpu="1")
    assert len(cluster_nodes(cluster(group, autoscaling=True))) == 1 + 4
    assert len(cluster_nodes(cluster(group))) == 1 + 1


def test_start_parameters_win_over_resources_and_these_over_limits():
    group = worker(1, cpu="3500m", gpu="2")
    assert node_resources(WorkerGroup.model_validate(group)) == {"CPU": 4.0, "GPU": 2.0}
    said = {"CPU": "8", "accelerator_type:L4": "1"}
    assert node_resources(WorkerGroup.model_validate(group | {"resources": said})) == {
        "CPU": 8.0,
        "GPU": 2.0,
        "accelerator_type:L4": 1.0,
    }
    started = {"num-gpus": "1", "resources": '"{\\"accelerator_type:L4\\": 1}"'}
    assert node_resources(WorkerGroup.model_validate(group | {"rayStartParams": started})) == {
        "CPU": 4.0,
        "GPU": 1.0,
        "accelerator_type:L4": 1.0,
    }


@pytest.mark.parametrize(("text", "number"), [("2", 2), (4, 4), ("1500m", 1.5), ("many", 0)])
def test_a_quantity_is_a_number_with_a_unit(text, number):
    assert parse_quantity(text) == number
