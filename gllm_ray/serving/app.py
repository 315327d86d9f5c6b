"""What `import_path: gllm_ray.serving.app:build_app` in a Serve configuration names."""

from typing import Any

from ray.serve import Application

from gllm_ray.bundles import REPLICA_CPUS, bundles
from gllm_ray.config import parse_service_config
from gllm_ray.serving.server import LLMServer

_HEALTH_CHECK_PERIOD_S = 2.0


# A plain dict, so that a mistake is told in one line a key: Serve would validate a pydantic
# argument itself and print pydantic's own report.
def build_app(args: dict[str, Any]) -> Application:
    """Build the application from the `args` of its configuration.

    Raises:
        ConfigError: One line for each mistake.
    """
    config = parse_service_config(args)
    deployment = config.deployment
    return LLMServer.options(
        ray_actor_options={"num_cpus": REPLICA_CPUS},
        placement_group_bundles=bundles(config),
        placement_group_strategy=config.pipeline.placement_strategy,
        max_ongoing_requests=deployment.max_ongoing_requests,
        autoscaling_config={
            "min_replicas": deployment.min_replicas,
            "max_replicas": deployment.max_replicas,
            "target_ongoing_requests": deployment.target_ongoing_requests,
        },
        graceful_shutdown_timeout_s=deployment.graceful_shutdown_timeout_s,
        max_surge_percent=deployment.max_surge_percent,
        health_check_period_s=_HEALTH_CHECK_PERIOD_S,
    ).bind(config)
