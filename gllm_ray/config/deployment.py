"""How Ray Serve runs the replicas."""

from typing import Literal, Self

from pydantic import Field, model_validator

from gllm_ray.autoscaling_config import AutoscalingConfig, ScalingRule
from gllm_ray.config.http_access import AllowedOrigins, ApiKeyVariable, StreamKeepAlive
from gllm_ray.strict_schema import StrictModel


class DeploymentConfig(StrictModel):
    """How Ray Serve runs the replicas, one pipeline each."""

    min_replicas: int = Field(default=1, ge=0, description="Fewest replicas.")
    max_replicas: int = Field(default=1, ge=1, description="Most replicas.")
    target_ongoing_requests: float = Field(
        default=64,
        gt=0,
        description="Requests a replica should hold on average; more start another replica.",
    )
    autoscaling: AutoscalingConfig = AutoscalingConfig()
    max_ongoing_requests: int = Field(
        default=1024, ge=1, description="Requests a replica takes before Serve queues them."
    )
    routing: Literal["power_of_two", "prefix_aware"] = Field(
        default="power_of_two",
        description="Which replica a request goes to: of two drawn ones that with fewer requests, "
        "or the one that has the beginning of the prompt cached, unless too much waits there.",
    )
    graceful_shutdown_timeout_s: float = Field(
        default=60, ge=0, description="Seconds running requests get to finish."
    )
    max_surge_percent: int = Field(
        default=0,
        ge=0,
        le=100,
        description="Replicas, in percent, that a redeployment starts before it stops old ones, on "
        "free devices; 0: it stops some first.",
    )
    api_key_env: ApiKeyVariable = None
    allowed_origins: AllowedOrigins = ()
    stream_keep_alive_s: StreamKeepAlive = 30.0

    @property
    def scaling_rule(self) -> ScalingRule:
        """All that decides on the number of replicas."""
        return ScalingRule(
            min_replicas=self.min_replicas,
            max_replicas=self.max_replicas,
            target_ongoing_requests=self.target_ongoing_requests,
            **dict(self.autoscaling),
        )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: must be <= max_replicas={self.max_replicas}"
            )
        if self.target_ongoing_requests > self.max_ongoing_requests:
            raise ValueError(
                f"target_ongoing_requests={self.target_ongoing_requests:g}: must be <= "
                f"max_ongoing_requests={self.max_ongoing_requests}, or no replica is ever added"
            )
        return self
