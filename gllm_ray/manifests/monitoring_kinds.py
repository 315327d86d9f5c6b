"""PodMonitor and PrometheusRule of the Prometheus operator, the keys that this package uses."""

from typing import Annotated, Literal

from pydantic import Field

from gllm_ray.manifests.ray_cluster import KubeModel, Text
from gllm_ray.manifests.ray_kinds import Metadata

Duration = Annotated[
    str,
    Field(
        pattern=r"^(\d+(ms|[smhdwy]))+$",
        json_schema_extra={"allowed": "a duration of Prometheus such as 30s or 1h30m"},
    ),
]
Labels = dict[str, str]


class Selector(KubeModel):
    """Labels that a pod must have."""

    match_labels: Annotated[Labels, Field(min_length=1)]


class Relabeling(KubeModel):
    """A label made of others."""

    source_labels: list[str]
    target_label: Text


class Endpoint(KubeModel):
    """A port that is scraped."""

    port: Text
    path: str | None = None
    interval: Duration | None = None
    relabelings: list[Relabeling] = Field(default=[])


class PodMonitorSpec(KubeModel):
    """The `spec` of a PodMonitor."""

    selector: Selector
    pod_metrics_endpoints: Annotated[list[Endpoint], Field(min_length=1)]


class PodMonitor(KubeModel):
    """Pods that Prometheus scrapes."""

    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PodMonitor"]
    metadata: Metadata
    spec: PodMonitorSpec


class Rule(KubeModel):
    """An alert."""

    alert: Text
    expr: Text
    for_: Duration = Field(alias="for")
    labels: Labels
    annotations: Labels


class RuleGroup(KubeModel):
    """Alerts that are evaluated together."""

    name: Text
    interval: Duration | None = None
    rules: Annotated[list[Rule], Field(min_length=1)]


class PrometheusRuleSpec(KubeModel):
    """The `spec` of a PrometheusRule."""

    groups: Annotated[list[RuleGroup], Field(min_length=1)]


class PrometheusRule(KubeModel):
    """Alerts."""

    api_version: Literal["monitoring.coreos.com/v1"]
    kind: Literal["PrometheusRule"]
    metadata: Metadata
    spec: PrometheusRuleSpec
