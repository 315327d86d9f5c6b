"""What `import_path: gllm_ray.serving.app:build_app` in a Serve configuration names."""

import logging
from typing import Any

from ray.serve import Application
from ray.serve._private.constants import RAY_SERVE_ENABLE_HA_PROXY
from ray.serve.config import RequestRouterConfig

from gllm_ray.bundles import REPLICA_CPUS, bundles
from gllm_ray.config import parse_service_config
from gllm_ray.serving.autoscaling import autoscaling_options
from gllm_ray.serving.routing import PrefixAwareRequestRouter
from gllm_ray.serving.server import LLMServer

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

    Raises:
        ConfigError: One line for each mistake.
    """
    config = parse_service_config(args)
    deployment = config.deployment
    if deployment.routing == "prefix_aware" and RAY_SERVE_ENABLE_HA_PROXY:
        logger.warning("HAProxy routes HTTP requests; deployment.routing is for handles alone")
    return LLMServer.options(
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles(config),
        placement_group_strategy=config.pipeline.placement_strategy,
        max_ongoing_requests=deployment.max_ongoing_requests,
        autoscaling_config=autoscaling_options(deployment.scaling_rule),
        request_router_config=_ROUTERS[deployment.routing],
        graceful_shutdown_timeout_s=deployment.graceful_shutdown_timeout_s,
        max_surge_percent=deployment.max_surge_percent,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
    ).bind(config)
