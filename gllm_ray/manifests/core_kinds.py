"""Kubernetes' own kinds, strictly: no unknown key."""

from collections.abc import Iterator
from typing import Any

import kubernetes_validate

from gllm_ray.manifests.schema_errors import describe_errors

KUBERNETES_VERSION = "1.32"  # the oldest whose schema is checked; keys that came later are mistakes
_POD = {"apiVersion": "v1", "kind": "Pod"}


def find_core_mistakes(item: dict[str, Any]) -> list[str] | None:
    """One line for the first mistake in an object; None if its group is not Kubernetes' own."""
    try:
        return _first_mistake(item)
    except kubernetes_validate.SchemaNotFoundError:
        if "." in item["apiVersion"]:
            return None
        return [f"kind={item['kind']!r}: is none of {item['apiVersion']}"]


def find_pod_mistakes(value: object, path: str = "") -> Iterator[str]:
    """The first mistake of each pod template in an object of another kind."""
    if isinstance(value, list):
        for i, item in enumerate(value):
            yield from find_pod_mistakes(item, f"{path}[{i}]")
    elif isinstance(value, dict):
        for key, child in value.items():
            place = f"{path}.{key}".removeprefix(".")
            if key in ("template", "submitterPodTemplate") and isinstance(child, dict):
                yield from _first_mistake(_POD | child, place)
            else:
                yield from find_pod_mistakes(child, place)


def _first_mistake(item: dict[str, Any], prefix: str = "") -> list[str]:
    try:
        kubernetes_validate.validate(item, KUBERNETES_VERSION, strict=True)
    except kubernetes_validate.ValidationError as error:
        return describe_errors([error], prefix)
    return []
