"""What a RayService says twice, or in two places: its applications against its pods."""

from collections.abc import Iterator

from gllm_ray.config import FRONT_END_NAME, FrontEndConfig, ModelsConfig
from gllm_ray.errors import ConfigError
from gllm_ray.manifests.capacity import Demand, find_capacity_mistakes
from gllm_ray.manifests.ray_kinds import RayService
from gllm_ray.serve_file import app_config, find_serve_mistakes, services_of
from gllm_ray.serve_schema import Application, Deployment, ServeFile
from gllm_ray.strict_yaml import parse_documents

_CONFIG = "spec.serveConfigV2"
_CLUSTER = "spec.rayClusterConfig"
_STOP_MARGIN_S = 20  # for Ray to stop once no request is left
_LOOPBACK = ("127.0.0.1", "localhost", "::1")


def find_service_mistakes(service: RayService) -> list[str]:
    """One line for each mistake in `serveConfigV2`, or between it and the pods."""
    try:
        documents = parse_documents(service.spec.serve_config_v2, _CONFIG)
    except ConfigError as error:
        return [str(error)]
    if len(documents) != 1:
        return [f"{_CONFIG}: has {len(documents)} documents; must have one"]
    if mistakes := find_serve_mistakes(documents[0]):
        return [f"{_CONFIG}: {mistake}" for mistake in mistakes]
    serve_file = ServeFile.model_validate(documents[0])
    found = list(_find_port_mistakes(service, serve_file))
    found += _find_room_mistakes(service, serve_file)
    found += _find_drain_mistakes(service, serve_file)
    return found


def _find_port_mistakes(service: RayService, serve_file: ServeFile) -> Iterator[str]:
    options = serve_file.http_options
    if options.host in _LOOPBACK:
        yield (
            f"{_CONFIG}: http_options.host={options.host!r}: must be 0.0.0.0, or no Service "
            "reaches it"
        )
    for i, group in enumerate(service.spec.ray_cluster_config.worker_group_specs):
        for j, port in enumerate(group.ray_container.ports):
            if port.get("name") == "serve" and port.get("containerPort") != options.port:
                yield (
                    f"{_CLUSTER}.workerGroupSpecs[{i}].template.spec.containers[0].ports[{j}]"
                    f".containerPort={port.get('containerPort')}: must be http_options.port="
                    f"{options.port} of serveConfigV2"
                )


def _find_room_mistakes(service: RayService, serve_file: ServeFile) -> Iterator[str]:
    demands = []
    for application in serve_file.applications:
        for name, config in services_of(application).items():
            num_replicas = _num_replicas(application, name, config.deployment.max_replicas)
            demands.append(Demand.of(application.name, config, num_replicas))
        if (frontend := _frontend(application)) is not None:
            num_replicas = _num_replicas(application, FRONT_END_NAME, frontend.num_replicas)
            demands.append(Demand.of_front_ends(application.name, num_replicas))
    for mistake in find_capacity_mistakes(service.spec.ray_cluster_config, demands):
        yield f"{_CLUSTER}.{mistake}"


def _find_drain_mistakes(service: RayService, serve_file: ServeFile) -> Iterator[str]:
    drain_s = max(map(_drain_s, serve_file.applications), default=0.0)
    least_s, spec = drain_s + _STOP_MARGIN_S, service.spec
    reason = (
        f"must be at least {least_s:g}: graceful_shutdown_timeout_s={drain_s:g} of serveConfigV2"
    )
    for i, group in enumerate(spec.ray_cluster_config.worker_group_specs):
        grace_s = group.template.spec.termination_grace_period_seconds
        if grace_s < least_s:
            yield (
                f"{_CLUSTER}.workerGroupSpecs[{i}].template.spec.terminationGracePeriodSeconds="
                f"{grace_s}: {reason}, and {_STOP_MARGIN_S} s for Ray"
            )
    delay_s = spec.ray_cluster_deletion_delay_seconds
    if spec.upgrade_strategy.type != "None" and delay_s < drain_s:
        yield (
            f"spec.rayClusterDeletionDelaySeconds={delay_s}: must be at least {drain_s:g}, or an "
            "upgrade cuts requests short: graceful_shutdown_timeout_s of serveConfigV2"
        )


def _frontend(application: Application) -> FrontEndConfig | None:
    """The front ends of an application, if it has any."""
    config = app_config(application)
    return config.frontend if isinstance(config, ModelsConfig) else None


def _override(application: Application, deployment: str) -> Deployment | None:
    """What an application says of one of our deployments, besides its `args`."""
    return next((d for d in application.deployments or () if d.name == deployment), None)


def _num_replicas(application: Application, deployment: str, default: int) -> int:
    """As many as there may be."""
    override = _override(application, deployment)
    if override is not None and isinstance(override.num_replicas, int):
        return override.num_replicas
    if override is not None and override.autoscaling_config is not None:
        return override.autoscaling_config.max_replicas
    return default


def _drain_s(application: Application) -> float:
    """How long the slowest of our deployments may take to end its requests."""
    drain_s = {
        name: config.deployment.graceful_shutdown_timeout_s
        for name, config in services_of(application).items()
    }
    if (frontend := _frontend(application)) is not None:
        drain_s[FRONT_END_NAME] = frontend.graceful_shutdown_timeout_s
    for name in drain_s:
        override = _override(application, name)
        if override is not None and override.graceful_shutdown_timeout_s is not None:
            drain_s[name] = float(override.graceful_shutdown_timeout_s)
    return max(drain_s.values(), default=0.0)
