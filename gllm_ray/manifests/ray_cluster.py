"""The part of a KubeRay manifest that describes a Ray cluster, as a strict schema.

The keys are those of the custom resource definitions of KubeRay 1.7.0, which a test compares. The
validators are rules that the operator applies to an object that the API server has taken already.
Pods are Kubernetes' own and are checked as such; here are the keys that rules need.

Source: KubeRay, `ray-operator/controllers/ray/utils/validation.go`. Stricter than it: who may use
the cluster has to be said, `minReplicas` is at most `maxReplicas`, an autoscaler needs the API
server's token, and `num-cpus` and `num-gpus` are numbers, and not left to a shell.
"""

import re
from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Field, model_validator
from pydantic.alias_generators import to_camel

from gllm_ray.strict_schema import StrictModel

RAY_VERSION_WITH_TOKENS = (2, 52)

Mapping = dict[str, Any]
Text = Annotated[str, Field(min_length=1)]
NonNegative = Annotated[int, Field(ge=0)]


class KubeModel(StrictModel):
    """A mapping whose keys are spelled as Kubernetes spells them."""

    model_config = ConfigDict(alias_generator=to_camel)


class PodModel(KubeModel):
    """A mapping of which only some keys are known here; the others are left to the pod's schema."""

    model_config = ConfigDict(extra="allow")


class EnvVar(PodModel):
    """An item of a container's `env`."""

    name: Text


class Container(PodModel):
    """A container; the first of a pod runs Ray."""

    name: Text
    image: Text
    resources: Mapping = Field(default={})
    env: list[EnvVar] = Field(default=[])
    ports: list[Mapping] = Field(default=[])


class PodSpec(PodModel):
    """The `spec` of a pod."""

    containers: Annotated[list[Container], Field(min_length=1)]
    restart_policy: str | None = None
    termination_grace_period_seconds: NonNegative = 30
    automount_service_account_token: bool = True


class PodTemplate(PodModel):
    """The pod that a group starts."""

    spec: PodSpec


class GroupSpec(KubeModel):
    """What head and workers have in common."""

    template: PodTemplate
    ray_start_params: dict[str, str] = Field(default={})
    resources: dict[str, str] = Field(default={})
    labels: dict[str, str] = Field(default={})

    @model_validator(mode="after")
    def _check_resources(self) -> Self:
        doubled = {"num-cpus", "num-gpus", "memory", "resources"} & set(self.ray_start_params)
        if self.resources and doubled:
            raise ValueError(
                f"resources={{...}}: must be left out beside rayStartParams.{min(doubled)}"
            )
        for option in ("num-cpus", "num-gpus"):
            value = self.ray_start_params.get(option, "0")
            if not value.isdecimal():
                raise ValueError(
                    f"rayStartParams.{option}={value!r}: must be a whole number; where it is left "
                    "out, the limits of the pod say it"
                )
        if "labels" in self.ray_start_params:
            raise ValueError("rayStartParams.labels: must be left out; labels of the group say it")
        return self

    @property
    def ray_container(self) -> Container:
        """The container that runs Ray."""
        return self.template.spec.containers[0]


class HeadGroup(GroupSpec):
    """`headGroupSpec`."""

    enable_ingress: bool | None = None
    head_service: Mapping | None = None
    ingress_options: Mapping | None = None
    service_type: str | None = None


class WorkerGroup(GroupSpec):
    """An item of `workerGroupSpecs`."""

    group_name: Text
    replicas: NonNegative = 0
    min_replicas: NonNegative = 0
    max_replicas: Annotated[int, Field(ge=1)]
    num_of_hosts: Annotated[int, Field(ge=1)] = 1
    idle_timeout_seconds: NonNegative | None = None
    priority: int = 0
    scale_strategy: Mapping | None = None
    suspend: bool = False

    @model_validator(mode="after")
    def _check_replicas(self) -> Self:
        low, high = self.min_replicas, self.max_replicas
        if low > high:
            raise ValueError(f"minReplicas={low}: must be <= maxReplicas={high}")
        if "replicas" in self.model_fields_set and not low <= self.replicas <= high:
            raise ValueError(
                f"replicas={self.replicas}: must be from minReplicas={low} to maxReplicas={high}"
            )
        return self


class AuthOptions(KubeModel):
    """`authOptions`: who may use the cluster."""

    mode: Literal["disabled", "token"]
    secret_name: str | None = None
    enable_k8s_token_auth: bool | None = Field(default=None, alias="enableK8sTokenAuth")


class AutoscalerOptions(KubeModel):
    """`autoscalerOptions`: the container beside the head that adds and removes workers."""

    version: Literal["v1", "v2"] | None = None
    idle_timeout_seconds: NonNegative | None = None
    upscaling_mode: Literal["Default", "Aggressive", "Conservative"] | None = None
    image: str | None = None
    image_pull_policy: str | None = None
    resources: Mapping | None = None
    security_context: Mapping | None = None
    args: list[str] | None = None
    command: list[str] | None = None
    env: list[Mapping] | None = None
    env_from: list[Mapping] | None = None
    volume_mounts: list[Mapping] | None = None


class GcsFaultToleranceOptions(KubeModel):
    """`gcsFaultToleranceOptions`: where the state of the cluster survives its head."""

    backend: Literal["redis", "rocksdb"] | None = None
    redis_address: str | None = None
    redis_username: Mapping | None = None
    redis_password: Mapping | None = None
    external_storage_namespace: str | None = None
    storage: Mapping | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backend != "rocksdb" and not self.redis_address:
            raise ValueError("redisAddress: required, unless backend is rocksdb")
        if self.redis_password is not None and "value" in self.redis_password:
            raise ValueError("redisPassword.value=<hidden>: must be a valueFrom.secretKeyRef")
        return self


class ClusterUpgradeStrategy(KubeModel):
    """`upgradeStrategy` of a cluster."""

    type: Literal["Recreate", "None"] | None = None


class RayClusterSpec(KubeModel):
    """`spec` of a RayCluster, `rayClusterConfig` of a RayService, `rayClusterSpec` of a RayJob."""

    head_group_spec: HeadGroup
    worker_group_specs: list[WorkerGroup] = Field(default=[])
    ray_version: str | None = None
    auth_options: AuthOptions
    enable_in_tree_autoscaling: bool = False
    autoscaler_options: AutoscalerOptions | None = None
    gcs_fault_tolerance_options: GcsFaultToleranceOptions | None = None
    head_service_annotations: dict[str, str] | None = None
    history_server_options: Mapping | None = None
    managed_by: str | None = None
    network_policy: Mapping | None = None
    suspend: bool | None = None
    tls_options: Mapping | None = None
    upgrade_strategy: ClusterUpgradeStrategy | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        self._check_version()
        self._check_gcs_fault_tolerance()
        if self.enable_in_tree_autoscaling:
            self._check_autoscaler()
        names = [group.group_name for group in self.worker_group_specs]
        for i, name in enumerate(names):
            if name in names[:i]:
                raise ValueError(
                    f"workerGroupSpecs[{i}].groupName={name!r}: must differ from "
                    f"workerGroupSpecs[{names.index(name)}].groupName"
                )
        return self

    def _check_version(self) -> None:
        if self.auth_options.mode != "token":
            return
        least = ".".join(map(str, RAY_VERSION_WITH_TOKENS))
        if self.ray_version is None:
            raise ValueError(
                f"rayVersion: required beside authOptions.mode=token; at least {least}"
            )
        match = re.fullmatch(r"(\d+)\.(\d+)(\.\d+.*)?", self.ray_version)
        if match is None or (int(match[1]), int(match[2])) < RAY_VERSION_WITH_TOKENS:
            raise ValueError(
                f"rayVersion={self.ray_version!r}: must be at least {least} for "
                "authOptions.mode=token"
            )

    def _check_gcs_fault_tolerance(self) -> None:
        head = self.head_group_spec
        names = {variable.name for variable in head.ray_container.env}
        for name in sorted(names & {"RAY_REDIS_ADDRESS", "REDIS_PASSWORD", "REDIS_USERNAME"}):
            raise ValueError(
                f"headGroupSpec.template.spec.containers[0].env: must not have {name}; "
                "gcsFaultToleranceOptions says it"
            )
        for name in sorted({"redis-password", "redis-username"} & set(head.ray_start_params)):
            raise ValueError(
                f"headGroupSpec.rayStartParams.{name}=<hidden>: must be left out; "
                "gcsFaultToleranceOptions says it"
            )

    def _check_autoscaler(self) -> None:
        if not self.head_group_spec.template.spec.automount_service_account_token:
            raise ValueError(
                "headGroupSpec.template.spec.automountServiceAccountToken=false: must be true when "
                "enableInTreeAutoscaling is; the autoscaler calls the API server"
            )
        groups = [("headGroupSpec", self.head_group_spec.template.spec)]
        for i, group in enumerate(self.worker_group_specs):
            groups.append((f"workerGroupSpecs[{i}]", group.template.spec))
            if group.suspend:
                raise ValueError(
                    f"workerGroupSpecs[{i}].suspend=true: must be false when "
                    "enableInTreeAutoscaling is true"
                )
        for key, pod in groups:
            if pod.restart_policy not in (None, "Never"):
                raise ValueError(
                    f"{key}.template.spec.restartPolicy={pod.restart_policy!r}: must be Never or "
                    "left out when enableInTreeAutoscaling is true"
                )
