"""Every check of one Kubernetes object."""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from gllm_ray.manifests.monitoring_kinds import PodMonitor, PrometheusRule
from gllm_ray.manifests.ray_cluster import KubeModel
from gllm_ray.manifests.ray_kinds import RayCluster, RayJob, RayService
from gllm_ray.manifests.service_rules import find_service_mistakes
from gllm_ray.strict_schema import find_mistakes

_MODELS: dict[str, type[KubeModel]] = {
    model.__name__: model for model in (RayService, RayCluster, RayJob, PodMonitor, PrometheusRule)
}


class Definitions(Protocol):
    """Custom resource definitions."""

    def find_mistakes(self, item: dict[str, Any]) -> list[str]:
        """One line for each mistake; none if the kind is not defined."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checks:
    """What objects are checked against, besides our own schemas and rules.

    Attributes:
        definitions: Custom resource definitions; None: there are none.
        core: Finds mistakes in Kubernetes' own kinds, and None in others; None: not installed.
        pods: Finds mistakes in the pods of other kinds.
    """

    definitions: Definitions | None = None
    core: Callable[[dict[str, Any]], list[str] | None] | None = None
    pods: Callable[[object], Any] = field(default=lambda _: ())

    def find_object_mistakes(self, item: object) -> list[str]:
        """One line for each mistake, one at most for each key."""
        if not isinstance(item, dict) or not {"apiVersion", "kind"} <= set(item):
            return ["must be an object of Kubernetes, with apiVersion and kind"]
        lines = self._ours(item)
        if self.definitions is not None:
            lines += self.definitions.find_mistakes(item)
        if self.core is not None and not lines:
            lines += self._cores(item)
        return list({_key(line): line for line in reversed(lines)}.values())[::-1]

    def _ours(self, item: dict[str, Any]) -> list[str]:
        model = _MODELS.get(item["kind"])
        if model is None:
            return _disruption_mistakes(item) if item["kind"] == "PodDisruptionBudget" else []
        lines = find_mistakes(model, item)
        if not lines and model is RayService:
            lines = find_service_mistakes(RayService.model_validate(item))
        return lines

    def _cores(self, item: dict[str, Any]) -> list[str]:
        assert self.core is not None
        mistakes = self.core(item)
        if mistakes is not None:
            return mistakes
        if item["kind"] in _MODELS:
            return list(self.pods(item))
        return [f"kind={item['kind']!r}: is none of {item['apiVersion']}, and is not checked"]


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
