"""RayCluster, RayService and RayJob, as strict schemas; see `ray_cluster`."""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gllm_ray.manifests.ray_cluster import KubeModel, Mapping, NonNegative, RayClusterSpec, Text

QUEUE_LABEL = "kueue.x-k8s.io/queue-name"
_CLUSTER_LABEL = "ray.io/cluster"
_FT_ANNOTATIONS = ("ray.io/ft-enabled", "ray.io/external-storage-namespace")
_TIMEOUT_ANNOTATION = "ray.io/initializing-timeout"


def _name(max_length: int) -> Any:  # noqa: ANN401 - what Field returns
    return Field(
        pattern=r"^[a-z]([-a-z0-9]*[a-z0-9])?$",
        max_length=max_length,
        json_schema_extra={
            "allowed": f"at most {max_length} of a-z, 0-9 and -, from a letter to a letter or digit"
        },
    )


Percent = Annotated[int, Field(ge=0, le=100)]


class Metadata(KubeModel):
    """What identifies an object."""

    name: Annotated[str, _name(47)]
    namespace: str | None = None
    labels: dict[str, str] = Field(default={})
    annotations: dict[str, str] = Field(default={})


class ClusterMetadata(Metadata):
    """That of a RayCluster, whose name may be longer."""

    name: Annotated[str, _name(53)]


class ServiceMetadata(Metadata):
    """That of a RayService."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        timeout = self.annotations.get(_TIMEOUT_ANNOTATION, "30m")
        if not re.fullmatch(r"(\d+(\.\d+)?[hms])+|[1-9]\d*", timeout):
            raise ValueError(
                f"annotations.{_TIMEOUT_ANNOTATION}={timeout!r}: must be a duration such as 30m, "
                "or seconds"
            )
        return self


class RayCluster(KubeModel):
    """A cluster that lasts."""

    api_version: Literal["ray.io/v1"]
    kind: Literal["RayCluster"]
    metadata: ClusterMetadata
    spec: RayClusterSpec


class ClusterUpgradeOptions(KubeModel):
    """How traffic moves from the old cluster to the new one."""

    gateway_class_name: Text
    step_size_percent: Percent
    interval_seconds: Annotated[int, Field(ge=1)]
    max_surge_percent: Percent = 100

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.step_size_percent > self.max_surge_percent:
            raise ValueError(
                f"stepSizePercent={self.step_size_percent}: must be <= "
                f"maxSurgePercent={self.max_surge_percent}"
            )
        return self


class UpgradeStrategy(KubeModel):
    """What a change of the cluster does; the API server takes any text as `type`."""

    type: Literal["None", "NewCluster", "NewClusterWithIncrementalUpgrade"] = "NewCluster"
    cluster_upgrade_options: ClusterUpgradeOptions | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.is_incremental and self.cluster_upgrade_options is None:
            raise ValueError(f"clusterUpgradeOptions: required when type is {self.type}")
        return self

    @property
    def is_incremental(self) -> bool:
        """Whether the new cluster takes over step by step."""
        return self.type == "NewClusterWithIncrementalUpgrade"


class RayServiceSpec(KubeModel):
    """The `spec` of a RayService."""

    serve_config_v2: Text
    ray_cluster_config: RayClusterSpec
    upgrade_strategy: UpgradeStrategy = UpgradeStrategy()
    ray_cluster_deletion_delay_seconds: NonNegative = 60
    exclude_head_pod_from_serve_svc: bool = False
    serve_service: Mapping | None = None
    managed_by: str | None = None
    suspend: bool | None = None
    service_unhealthy_second_threshold: NonNegative | None = None
    deployment_unhealthy_second_threshold: NonNegative | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        cluster = self.ray_cluster_config
        if self.upgrade_strategy.is_incremental and not cluster.enable_in_tree_autoscaling:
            raise ValueError(
                "rayClusterConfig.enableInTreeAutoscaling=false: must be true when "
                f"upgradeStrategy.type is {self.upgrade_strategy.type}"
            )
        return self


class RayService(KubeModel):
    """A cluster with the applications that it serves."""

    api_version: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: ServiceMetadata
    spec: RayServiceSpec

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_annotations(self.metadata.annotations, self.spec.ray_cluster_config)
        if QUEUE_LABEL in self.metadata.labels:
            check_queue(self.spec.ray_cluster_config, "spec.rayClusterConfig")
        return self


class DeletionStrategy(KubeModel):
    """`deletionStrategy`: what goes when a job has ended."""

    deletion_rules: list[Mapping] | None = None
    on_success: Mapping | None = None
    on_failure: Mapping | None = None


class RayJobSpec(KubeModel):
    """The `spec` of a RayJob."""

    entrypoint: Text
    ray_cluster_spec: RayClusterSpec | None = None
    cluster_selector: dict[str, str] = Field(default={})
    submission_mode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = (
        "K8sJobMode"
    )
    shutdown_after_job_finishes: bool = False
    ttl_seconds_after_finished: NonNegative = 0
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    pre_running_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    backoff_limit: NonNegative = 0
    deletion_strategy: DeletionStrategy | None = None
    entrypoint_num_cpus: float | None = None
    entrypoint_num_gpus: float | None = None
    entrypoint_resources: str | None = None
    job_id: str | None = None
    managed_by: str | None = None
    metadata: dict[str, str] | None = None
    runtime_env_yaml: str | None = Field(default=None, alias="runtimeEnvYAML")
    submitter_config: Mapping | None = None
    submitter_pod_template: Mapping | None = None
    suspend: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.ray_cluster_spec is None) == (not self.cluster_selector):
            raise ValueError("rayClusterSpec: must be given or clusterSelector, not both")
        if self.cluster_selector and not self.cluster_selector.get(_CLUSTER_LABEL):
            raise ValueError(f"clusterSelector.{_CLUSTER_LABEL}: required; the name of a cluster")
        if self.ttl_seconds_after_finished and not self.shutdown_after_job_finishes:
            raise ValueError(
                f"ttlSecondsAfterFinished={self.ttl_seconds_after_finished}: must be left out "
                "unless shutdownAfterJobFinishes is true"
            )
        rules = self.deletion_strategy is not None and self.deletion_strategy.deletion_rules
        if rules and self.shutdown_after_job_finishes:
            raise ValueError(
                "shutdownAfterJobFinishes=true: must be false beside deletionStrategy.deletionRules"
            )
        if self.suspend and not self.shutdown_after_job_finishes:
            raise ValueError("suspend=true: must go with shutdownAfterJobFinishes=true")
        if self.submission_mode == "InteractiveMode" and self.backoff_limit:
            raise ValueError(
                f"backoffLimit={self.backoff_limit}: must be 0 when submissionMode is "
                "InteractiveMode"
            )
        return self


class RayJob(KubeModel):
    """A command on a cluster, which it may bring along."""

    api_version: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec

    @model_validator(mode="after")
    def _check(self) -> Self:
        cluster = self.spec.ray_cluster_spec
        if cluster is not None:
            check_annotations(self.metadata.annotations, cluster)
            if QUEUE_LABEL in self.metadata.labels:
                check_queue(cluster, "spec.rayClusterSpec")
        return self


def check_annotations(annotations: dict[str, str], cluster: RayClusterSpec) -> None:
    """Raise if annotations say what `gcsFaultToleranceOptions` says already."""
    for key in _FT_ANNOTATIONS:
        if key in annotations and cluster.gcs_fault_tolerance_options is not None:
            raise ValueError(
                f"metadata.annotations.{key}={annotations[key]!r}: must be left out beside "
                "gcsFaultToleranceOptions"
            )


def check_queue(cluster: RayClusterSpec, key: str) -> None:
    """Raise if a cluster that waits in a queue of Kueue would change its size."""
    if cluster.enable_in_tree_autoscaling:
        raise ValueError(
            f"{key}.enableInTreeAutoscaling=true: must be false beside the label {QUEUE_LABEL}; "
            "Kueue admits a cluster of one size"
        )
