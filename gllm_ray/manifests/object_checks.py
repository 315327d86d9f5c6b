"""Every check of one Kubernetes object."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from typing import Any

from gllm_ray.manifests.monitoring_kinds import PodMonitor, PrometheusRule
from gllm_ray.manifests.ray_cluster import KubeModel
from gllm_ray.manifests.ray_kinds import RayCluster, RayJob, RayService
from gllm_ray.manifests.service_rules import find_service_mistakes
from gllm_ray.strict_schema import find_mistakes

OUR_KINDS: dict[str, type[KubeModel]] = {
    model.__name__: model for model in (RayService, RayCluster, RayJob, PodMonitor, PrometheusRule)
}


Finder = Callable[[dict[str, Any]], list[str] | None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What objects are checked against.

    Attributes:
        finders: Each has one line for each mistake in an object; None if it does not know the kind.
        lacking: What else they could be checked against, and how to get it.
    """

    finders: tuple[Finder, ...]
    lacking: tuple[str, ...] = ()

    def find_object_mistakes(self, item: object) -> list[str] | None:
        """One line for each mistake, one at most for each key; None if nobody knows the kind."""
        if not isinstance(item, dict) or not all(
            isinstance(item.get(key), str) for key in ("apiVersion", "kind")
        ):
            return ["must be an object of Kubernetes, with apiVersion and kind"]
        answers = [lines for finder in self.finders if (lines := finder(item)) is not None]
        if not answers:
            return None
        by_key: dict[str, str] = {}
        for line in chain.from_iterable(answers):
            by_key.setdefault(_key(line), line)
        return list(by_key.values())


def find_our_mistakes(item: dict[str, Any]) -> list[str] | None:
    """What our own schemas and rules have against an object; see `Checks.finders`."""
    if item["kind"] == "PodDisruptionBudget":
        return _disruption_mistakes(item)
    if (model := OUR_KINDS.get(item["kind"])) is None:
        return None
    lines = find_mistakes(model, item)
    if not lines and model is RayService:
        lines = find_service_mistakes(RayService.model_validate(item))
    return lines


def object_name(item: object) -> str:
    """How a message names an object."""
    data = item if isinstance(item, dict) else {}
    metadata = data.get("metadata")
    name = metadata.get("name") if isinstance(metadata, dict) else None
    return f"{data.get('kind', 'object')} {name or 'without a name'}"


def _disruption_mistakes(item: dict[str, Any]) -> list[str]:
    """Kubernetes cannot tell how many pods a RayCluster wants, so only `minAvailable: N` works."""
    spec: Any = item.get("spec")
    lines: list[str] = []
    if not isinstance(spec, dict):
        return lines
    if "maxUnavailable" in spec:
        lines.append("spec.maxUnavailable: must be left out for pods of Ray; use minAvailable")
    if "minAvailable" in spec and not isinstance(spec["minAvailable"], int):
        lines.append(
            f"spec.minAvailable={spec['minAvailable']!r}: must be a number of pods for pods of Ray"
        )
    return lines


def _key(line: str) -> str:
    """The key that a line is about."""
    match = re.match(r"[^=\s]+?(?==|: |$)", line)
    return match.group() if match else line
