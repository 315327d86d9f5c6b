"""What `import_path: gllm_ray.serving.app:build_app` in a Serve configuration names."""

import logging
from typing import Any

from ray.serve import Application, Deployment
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import RequestRouterConfig

from gllm_ray.bundles import REPLICA_CPUS, bundles
from gllm_ray.config import (
    FRONT_END_NAME,
    ModelsConfig,
    ServiceConfig,
    args_schema,
    deployment_name,
)
from gllm_ray.serving.autoscaling import autoscaling_options
from gllm_ray.serving.frontend import FrontEnd
from gllm_ray.serving.routing import PrefixAwareRequestRouter
from gllm_ray.serving.server import LLMServer, PipelineServer
from gllm_ray.strict_schema import parse_strictly

logger = logging.getLogger(__name__)

_HEALTH_CHECK_PERIOD_S = 2.0
_ROUTERS = {
    "power_of_two": RequestRouterConfig(),
    "prefix_aware": RequestRouterConfig(request_router_class=PrefixAwareRequestRouter),
}


# A plain dict, so that a mistake is told in one line a key: Serve would validate a pydantic
# argument itself and print pydantic's own report.
def build_app(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of its configuration.

    One deployment has routes and pipeline; with `models`, each model has a deployment, and the
    routes another.

    Raises:
        ConfigError: One line for each mistake.
    """
    config = parse_strictly(args_schema(args), args)
    if isinstance(config, ModelsConfig):
        return _build_front_end(config)
    if config.deployment.routing == "prefix_aware" and RAY_SERVE_ENABLE_HA_PROXY:
        logger.warning("HAProxy routes HTTP requests; deployment.routing is for handles alone")
    return _with_pipelines(LLMServer, config).bind(config)


def _build_front_end(config: ModelsConfig) -> Application:
    frontend = config.frontend
    pipelines = [
        _with_pipelines(PipelineServer, model, name=deployment_name(model)).bind(model)
        for model in config.models
    ]
    return FrontEnd.options(
        name=FRONT_END_NAME,
        num_replicas=frontend.num_replicas,
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        max_ongoing_requests=frontend.max_ongoing_requests,
        graceful_shutdown_timeout_s=frontend.graceful_shutdown_timeout_s,
        max_surge_percent=frontend.max_surge_percent,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
    ).bind(config, *pipelines)


def _with_pipelines(deployment: Deployment, config: ServiceConfig, **options: str) -> Deployment:
    """A deployment whose replicas have a pipeline each."""
    settings = config.deployment
    return deployment.options(
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles(config),
        placement_group_strategy=config.pipeline.placement_strategy,
        max_ongoing_requests=settings.max_ongoing_requests,
        autoscaling_config=autoscaling_options(settings.scaling_rule),
        request_router_config=_ROUTERS[settings.routing],
        graceful_shutdown_timeout_s=settings.graceful_shutdown_timeout_s,
        max_surge_percent=settings.max_surge_percent,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
        **options,
    )
