"""Whether the pods of a cluster can hold the pipelines that are to run on it."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from gllm_ray.bundles import REPLICA_CPUS, bundles
from gllm_ray.config import ServiceConfig
from gllm_ray.manifests.ray_cluster import GroupSpec, RayClusterSpec, WorkerGroup

Resources = dict[str, float]

_CPU_UNITS = {"": 1.0, "m": 1e-3, "k": 1e3}
_ROUNDING = 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class Demand:
    """Replicas of one application.

    Attributes:
        name: Of the application.
        num_replicas: As many as there may be.
        bundles: What the placement group of each reserves.
        strategy: How Ray lays them over nodes.
    """

    name: str
    num_replicas: int
    bundles: Sequence[Resources]
    strategy: str

    @classmethod
    def of(cls, name: str, config: ServiceConfig, num_replicas: int) -> "Demand":
        """The demand of one of our applications."""
        return cls(
            name=name,
            num_replicas=num_replicas,
            bundles=bundles(config),
            strategy=config.pipeline.placement_strategy,
        )

    @classmethod
    def of_front_ends(cls, name: str, num_replicas: int) -> "Demand":
        """The demand of the replicas that have routes and no pipeline."""
        return cls(
            name=name, num_replicas=num_replicas, bundles=[{"CPU": REPLICA_CPUS}], strategy="PACK"
        )


def find_capacity_mistakes(cluster: RayClusterSpec, demands: Iterable[Demand]) -> list[str]:
    """One line for each application whose replicas do not all fit, told as a key of the cluster."""
    nodes, mistakes = cluster_nodes(cluster), []
    offer = _total(nodes)
    # What must lie together is placed first, and of that the largest.
    for demand in sorted(demands, key=_size, reverse=True):
        num_placed = sum(_place(demand, nodes) for _ in range(demand.num_replicas))
        if num_placed < demand.num_replicas:
            mistakes.append(
                f"workerGroupSpecs: offer {_words(offer)}, which hold {num_placed} of the "
                f"{demand.num_replicas} replicas of application {demand.name!r}, each of "
                f"{_words(_total(demand.bundles))} in {len(demand.bundles)} bundles "
                f"({demand.strategy}); must offer more by replicas, maxReplicas or limits, or "
                "num_stages or max_replicas must be lower"
            )
    return mistakes


def cluster_nodes(cluster: RayClusterSpec) -> list[Resources]:
    """What each node of a cluster offers when it is as large as it may be."""
    nodes = [node_resources(cluster.head_group_spec)]
    for group in cluster.worker_group_specs:
        num_pods = _num_pods(group, is_autoscaled=cluster.enable_in_tree_autoscaling)
        nodes += [node_resources(group) for _ in range(num_pods)]
    return nodes


def node_resources(group: GroupSpec) -> Resources:
    """CPU, GPU and custom resources that a pod of a group offers to Ray.

    Source: KubeRay, `ray-operator/controllers/ray/common/pod.go`: `rayStartParams` win over the
    group's `resources`, and these over the limits (of CPU else the requests) of the container.
    """
    limits = group.ray_container.resources.get("limits", {})
    requests = group.ray_container.resources.get("requests", {})
    node = {
        "CPU": float(math.ceil(parse_quantity(limits.get("cpu", requests.get("cpu", 0))))),
        "GPU": sum(parse_quantity(value) for key, value in limits.items() if key.endswith("gpu")),
    }
    node |= {key: parse_quantity(value) for key, value in group.resources.items()}
    for key, option in (("CPU", "num-cpus"), ("GPU", "num-gpus")):
        if option in group.ray_start_params:
            node[key] = float(group.ray_start_params[option])
    custom = group.ray_start_params.get("resources", "")
    return node | {
        key: float(value) for key, value in re.findall(r'([\w:.-]+)\\*":\s*(\d+(?:\.\d+)?)', custom)
    }


def parse_quantity(value: object) -> float:
    """A quantity of Kubernetes, of CPUs or devices; 0 if it is none."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([mk]?)", str(value))
    return float(match[1]) * _CPU_UNITS[match[2]] if match else 0.0


def _num_pods(group: WorkerGroup, *, is_autoscaled: bool) -> int:
    if group.suspend:
        return 0
    num_replicas = max(group.replicas, group.min_replicas)
    return (group.max_replicas if is_autoscaled else num_replicas) * group.num_of_hosts


def _place(demand: Demand, nodes: list[Resources]) -> bool:
    """Take a replica's bundles from the nodes, if they all fit; the fullest node that has room."""
    wanted = [_total(demand.bundles)] if demand.strategy == "STRICT_PACK" else demand.bundles
    left = [dict(node) for node in nodes]
    used: set[int] = set()
    for bundle in sorted(wanted, key=lambda bundle: -bundle.get("GPU", 0.0)):
        free = [
            i
            for i, node in enumerate(left)
            if not (demand.strategy == "STRICT_SPREAD" and i in used)
            and all(node.get(key, 0.0) + _ROUNDING >= value for key, value in bundle.items())
        ]
        if not free:
            return False
        best = min(free, key=lambda i: (left[i].get("GPU", 0.0), left[i].get("CPU", 0.0)))
        used.add(best)
        for key, value in bundle.items():
            left[best][key] -= value
    nodes[:] = left
    return True


def _size(demand: Demand) -> tuple[bool, float, float]:
    total = _total(demand.bundles)
    return demand.strategy.startswith("STRICT"), total.get("GPU", 0.0), total["CPU"]


def _total(parts: Iterable[Resources]) -> Resources:
    total: Resources = {}
    for part in parts:
        for key, value in part.items():
            total[key] = total.get(key, 0.0) + value
    return total


def _words(resources: Resources) -> str:
    return ", ".join(f"{value:g} {key}" for key, value in sorted(resources.items()) if value)
