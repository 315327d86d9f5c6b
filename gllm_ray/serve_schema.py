"""Ray Serve's own configuration file, as a strict schema.

Serve drops a key that it does not know, and takes `min_replicas` above `max_replicas`; here both
are mistakes. The keys are those of `ray.serve.schema`, which a test compares, so that a file can
be checked where Ray is not installed or must not start.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from gllm_ray.strict_schema import StrictModel

UNSET: Any = None  # For a key whose default is Ray's own, and that may be left out but not be null.

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Port = Annotated[int, Field(ge=1, le=65535)]
NonNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Mapping = dict[str, Any]
Uri = Annotated[
    str,
    Field(
        pattern=r"^(gcs|conda|pip|uv|https?|s3|gs|azure|abfss|file|local)://.",
        json_schema_extra={"allowed": "a URI such as s3://bucket/code.zip or local:///path"},
    ),
]
RoutePrefix = Annotated[
    str,
    Field(
        pattern=r"^/([^{}]*[^{}/])?$",
        json_schema_extra={
            "allowed": "a path such as / or /llm, with no / at its end and no braces"
        },
    ),
]
ImportPath = Annotated[
    str,
    Field(
        pattern=r"^[^:\s]+[.:][^:.\s][^:\s]*$",
        json_schema_extra={"allowed": "an import path such as package.module:name"},
    ),
]


class HttpOptions(StrictModel):
    """`http_options`: the HTTP proxies."""

    host: Name = "0.0.0.0"
    port: Port = 8000
    root_path: str = UNSET
    request_timeout_s: Positive | None = None
    keep_alive_timeout_s: Annotated[int, Field(ge=0)] = UNSET
    ssl_keyfile: str | None = None
    ssl_certfile: str | None = None
    ssl_keyfile_password: str | None = None
    ssl_ca_certs: str | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for given, other in (("ssl_keyfile", "ssl_certfile"), ("ssl_certfile", "ssl_keyfile")):
            if getattr(self, given) and not getattr(self, other):
                raise ValueError(f"{given}={getattr(self, given)!r}: must go with {other}")
        return self


class GrpcOptions(StrictModel):
    """`grpc_options`: the gRPC proxies."""

    port: Port = UNSET
    grpc_servicer_functions: list[str] = UNSET
    request_timeout_s: Positive | None = None
    enable_reflection: bool = UNSET


class ControllerRuntimeEnv(StrictModel):
    """`controller_options.runtime_env`: Serve takes nothing but environment variables."""

    env_vars: dict[str, str] = UNSET


class ControllerOptions(StrictModel):
    """`controller_options`: Serve's controller actor."""

    runtime_env: ControllerRuntimeEnv | None = None


class LoggingOptions(StrictModel):
    """`logging_config` of Serve, an application or a deployment."""

    encoding: Literal["TEXT", "JSON"] = UNSET
    log_level: (
        Literal["CRITICAL", "FATAL", "ERROR", "WARNING", "WARN", "INFO", "DEBUG", "NOTSET"]
        | Literal[0, 10, 20, 30, 40, 50]
    ) = UNSET
    logs_dir: str | None = None
    enable_access_log: bool = UNSET
    additional_log_standard_attrs: list[str] = UNSET


class TracingOptions(StrictModel):
    """`tracing_config`: OpenTelemetry spans of Serve."""

    enabled: bool = UNSET
    exporter_import_path: str = UNSET
    sampling_ratio: Annotated[float, Field(ge=0, le=1)] = UNSET


class RuntimeEnv(StrictModel):
    """`runtime_env`: what Ray prepares before a worker starts."""

    env_vars: dict[str, str] = UNSET
    working_dir: Uri | None = None
    py_modules: list[Uri] = UNSET
    py_executable: str = UNSET
    excludes: list[str] = UNSET
    pip: Any = UNSET
    uv: Any = UNSET
    conda: Any = UNSET
    container: Mapping = UNSET
    image_uri: str = UNSET
    java_jars: list[str] = UNSET
    worker_process_setup_hook: str = UNSET
    nsight: Any = UNSET
    rocprof_sys: Any = UNSET
    config: Mapping = UNSET


class RayActorOptions(StrictModel):
    """`ray_actor_options`: how a replica's actor is started."""

    runtime_env: RuntimeEnv = UNSET
    num_cpus: NonNegative | None = None
    num_gpus: NonNegative | None = None
    memory: NonNegative | None = None
    resources: dict[str, NonNegative] = UNSET
    accelerator_type: str | None = None
    label_selector: dict[str, str] | None = None
    fallback_strategy: list[Mapping] | None = None


class AutoscalingPolicy(StrictModel):
    """`policy` or `autoscaling_policy`: the function that decides on the number of replicas."""

    policy_function: ImportPath = UNSET
    policy_kwargs: Mapping = UNSET


class AutoscalingOptions(StrictModel):
    """`autoscaling_config`: how many replicas there may be."""

    min_replicas: Annotated[int, Field(ge=0)] = 1
    initial_replicas: Annotated[int, Field(ge=0)] | None = None
    max_replicas: Count = 1
    target_ongoing_requests: Positive | None = UNSET
    metrics_interval_s: Positive = UNSET
    look_back_period_s: Positive = UNSET
    smoothing_factor: Positive = UNSET
    upscale_smoothing_factor: Positive | None = None
    downscale_smoothing_factor: Positive | None = None
    upscaling_factor: Positive | None = None
    downscaling_factor: Positive | None = None
    downscale_delay_s: NonNegative = UNSET
    downscale_to_zero_delay_s: NonNegative | None = None
    upscale_delay_s: NonNegative = UNSET
    aggregation_function: Literal["mean", "max", "min"] = UNSET
    policy: AutoscalingPolicy = UNSET

    @model_validator(mode="after")
    def _check(self) -> Self:
        low, initial, high = self.min_replicas, self.initial_replicas, self.max_replicas
        if low > high:
            raise ValueError(f"min_replicas={low}: must be <= max_replicas={high}")
        if initial is not None and not low <= initial <= high:
            raise ValueError(
                f"initial_replicas={initial}: must be from min_replicas={low} to "
                f"max_replicas={high}"
            )
        return self


class RequestRouterOptions(StrictModel):
    """`request_router_config`: how a handle chooses a replica."""

    request_router_class: ImportPath = UNSET
    request_router_kwargs: Mapping = UNSET
    request_routing_stats_period_s: Positive = UNSET
    request_routing_stats_timeout_s: Positive = UNSET
    initial_backoff_s: Positive = UNSET
    backoff_multiplier: Positive = UNSET
    max_backoff_s: Positive = UNSET


class BackpressureOptions(StrictModel):
    """`backpressure_config`: the answer when `max_queued_requests` is reached."""

    status_code: Literal[503, 429] = UNSET
    retry_after_s: NonNegative | None = None


class GangOptions(StrictModel):
    """`gang_scheduling_config`: replicas that start and stop together."""

    gang_size: Count
    gang_placement_strategy: Literal["PACK", "SPREAD"] = UNSET
    runtime_failure_policy: Literal["RESTART_GANG"] = UNSET


class DeploymentActor(StrictModel):
    """An item of `deployment_actors`: an actor that all replicas share."""

    name: Name
    actor_class: ImportPath
    init_args: list[Any] = UNSET
    init_kwargs: Mapping = UNSET
    actor_options: Mapping = UNSET


class Deployment(StrictModel):
    """An item of `deployments`: options that replace those of the code."""

    name: Name
    num_replicas: Count | Literal["auto"] | None = None
    max_ongoing_requests: Count = UNSET
    max_queued_requests: Literal[-1] | Count = UNSET
    backpressure_config: BackpressureOptions = UNSET
    user_config: Mapping | None = None
    autoscaling_config: AutoscalingOptions | None = None
    graceful_shutdown_wait_loop_s: NonNegative = UNSET
    graceful_shutdown_timeout_s: NonNegative = UNSET
    health_check_period_s: Positive = UNSET
    health_check_timeout_s: Positive = UNSET
    ray_actor_options: RayActorOptions = UNSET
    placement_group_bundles: list[dict[str, NonNegative]] = UNSET
    placement_group_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = UNSET
    placement_group_bundle_label_selector: list[dict[str, str]] = UNSET
    max_replicas_per_node: Annotated[int, Field(ge=1, le=100)] = UNSET
    logging_config: LoggingOptions = UNSET
    request_router_config: RequestRouterOptions = UNSET
    gang_scheduling_config: GangOptions | None = None
    deployment_actors: list[DeploymentActor] | None = None
    rolling_update_percentage: Annotated[float, Field(gt=0, le=1)] = UNSET
    max_surge_percent: Annotated[int, Field(ge=0, le=100)] = UNSET

    @model_validator(mode="after")
    def _check(self) -> Self:
        if isinstance(self.num_replicas, int) and self.autoscaling_config is not None:
            raise ValueError(
                f"num_replicas={self.num_replicas}: must be auto or left out beside "
                "autoscaling_config"
            )
        return self


class Application(StrictModel):
    """An item of `applications`."""

    name: Name = "default"
    route_prefix: RoutePrefix | None = "/"
    import_path: ImportPath
    runtime_env: RuntimeEnv = UNSET
    args: Mapping = UNSET
    deployments: list[Deployment] = UNSET
    autoscaling_policy: AutoscalingPolicy | None = None
    logging_config: LoggingOptions | None = None
    external_scaler_enabled: bool = UNSET

    @model_validator(mode="after")
    def _check(self) -> Self:
        for i, deployment in enumerate(self.deployments or ()):
            is_autoscaled = deployment.autoscaling_config or deployment.num_replicas == "auto"
            if self.external_scaler_enabled and is_autoscaled:
                raise ValueError(
                    f"external_scaler_enabled=true: must be false when deployments[{i}] autoscales"
                )
        return self


class ServeFile(StrictModel):
    """The whole file that `serve run`, `serve deploy` and KubeRay's `serveConfigV2` take."""

    proxy_location: Literal["EveryNode", "HeadOnly", "Disabled"] = UNSET
    http_options: HttpOptions = HttpOptions()
    grpc_options: GrpcOptions = UNSET
    controller_options: ControllerOptions | None = None
    logging_config: LoggingOptions | None = None
    tracing_config: TracingOptions | None = None
    applications: list[Application]
    target_capacity: Annotated[float, Field(ge=0, le=100)] | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        for key in ("name", "route_prefix"):
            first: dict[str, int] = {}
            for i, application in enumerate(self.applications):
                value = getattr(application, key)
                if value is not None and first.setdefault(value, i) != i:
                    raise ValueError(
                        f"applications[{i}].{key}={value!r}: must differ from "
                        f"applications[{first[value]}].{key}"
                    )
        return self
