"""The routes in a deployment of their own, before the pipelines of one model or several."""

import re
from typing import Annotated, Self

from pydantic import Field, model_validator

from gllm_ray.config.http_access import AllowedOrigins, ApiKeyVariable, StreamKeepAlive
from gllm_ray.config.service import ServiceConfig
from gllm_ray.strict_schema import StrictModel

FRONT_END_NAME = "FrontEnd"


class FrontEndConfig(StrictModel):
    """The replicas that answer HTTP, and what they do when a pipeline replica is lost."""

    num_replicas: int = Field(default=1, ge=1, description="Front ends.")
    max_ongoing_requests: int = Field(
        default=16384,
        ge=1,
        description="Requests of all models that a front end holds before Serve queues them.",
    )
    resume_timeout_s: float = Field(
        default=120.0,
        gt=0,
        description="Seconds a request waits, when the replica that held it is lost, for another "
        "one to take it; then it ends with 503, or its stream with an error.",
    )
    max_losses: int = Field(
        default=3,
        ge=1,
        description="Replicas that may be lost under a request; then it ends likewise. It may be "
        "what breaks them.",
    )
    graceful_shutdown_timeout_s: float = Field(
        default=60.0, ge=0, description="Seconds running requests get to finish."
    )
    max_surge_percent: int = Field(
        default=100,
        ge=0,
        le=100,
        description="Front ends, in percent, that a redeployment starts before it stops old ones; "
        "0: it stops some first, and no model answers until they have finished.",
    )
    api_key_env: ApiKeyVariable = None
    allowed_origins: AllowedOrigins = ()
    stream_keep_alive_s: StreamKeepAlive = 30.0


class ModelsConfig(StrictModel):
    """`args` of an application with a front end: each model is a whole configuration."""

    frontend: FrontEndConfig = FrontEndConfig()
    models: Annotated[tuple[ServiceConfig, ...], Field(strict=False)]

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.models:
            raise ValueError("models=[]: must list at least one")
        first: dict[str, int] = {}
        for i, config in enumerate(self.models):
            for key in ("api_key_env", "allowed_origins", "stream_keep_alive_s"):
                if key in config.deployment.model_fields_set:
                    value = getattr(config.deployment, key)
                    raise ValueError(
                        f"models[{i}].deployment.{key}={value!r}: must be frontend.{key}, for the "
                        "front end answers HTTP"
                    )
            name = deployment_name(config)
            if name == FRONT_END_NAME or first.setdefault(name, i) != i:
                other = f"that of models[{first[name]}]" if name in first else "the front end's"
                raise ValueError(
                    f"models[{i}].model.served_name={config.model.name!r}: its deployment "
                    f"{name!r} must differ from {other}"
                )
        return self


def deployment_name(config: ServiceConfig) -> str:
    """The deployment of a model's pipelines, where they have a front end."""
    return re.sub(r"[^A-Za-z0-9_.-]", "_", config.model.name)


def args_schema(args: object) -> type[ServiceConfig] | type[ModelsConfig]:
    """What the `args` of an application must be."""
    is_several = isinstance(args, dict) and ("models" in args or "frontend" in args)
    return ModelsConfig if is_several else ServiceConfig
