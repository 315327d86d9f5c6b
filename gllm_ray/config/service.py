"""All of it: what one replica of the service is built from."""

from typing import Any, Self

from pydantic import model_validator

from gllm_ray.config.byte_size import BYTES
from gllm_ray.config.deployment import DeploymentConfig
from gllm_ray.config.kv_cache import KvCacheConfig
from gllm_ray.config.model import ModelConfig
from gllm_ray.config.pipeline import PipelineConfig
from gllm_ray.config.recovery import RecoveryConfig
from gllm_ray.config.scheduler import SchedulerConfig
from gllm_ray.strict_schema import StrictModel, parse_strictly

_GPU_ATTENTION = ("triton", "xformers", "flash3")


class ServiceConfig(StrictModel):
    """All of `args`: what one replica of the service is built from."""

    model: ModelConfig
    pipeline: PipelineConfig = PipelineConfig()
    kv_cache: KvCacheConfig = KvCacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    recovery: RecoveryConfig = RecoveryConfig()
    deployment: DeploymentConfig = DeploymentConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pipeline.device == "cpu" and self.kv_cache.kv_cache_bytes is None:
            raise ValueError(
                f"kv_cache.kv_cache_bytes=null: must be {BYTES} when pipeline.device is cpu"
            )
        if self.model.quantization is not None and self.pipeline.device != "cpu":
            raise ValueError(
                f"model.quantization={self.model.quantization!r}: must be null when "
                f"pipeline.device is {self.pipeline.device}"
            )
        for name in ("enforce_eager", "compile"):
            if getattr(self.model, name) and self.pipeline.device == "cpu":
                raise ValueError(f"model.{name}=true: must be left out when pipeline.device is cpu")
        self._check_attention()
        return self

    def _check_attention(self) -> None:
        name, device = self.model.attention_backend, self.pipeline.device
        allowed = ("cpp",) if device == "cpu" else _GPU_ATTENTION
        if name not in ("auto", "torch", *allowed):
            raise ValueError(
                f"model.attention_backend={name!r}: must be auto, {', '.join(allowed)} or torch "
                f"when pipeline.device is {device}"
            )


def kv_cache_of(config: ServiceConfig, stage_id: int) -> KvCacheConfig:
    """The KV cache of one stage."""
    stage = config.pipeline.stage(stage_id)
    if stage.kv_cache_bytes is not None:
        return config.kv_cache.model_copy(update={"kv_cache_bytes": stage.kv_cache_bytes})
    if stage.memory_utilization is not None:
        own = {"memory_utilization": stage.memory_utilization, "kv_cache_bytes": None}
        return config.kv_cache.model_copy(update=own)
    return config.kv_cache


def parse_service_config(args: dict[str, Any]) -> ServiceConfig:
    """Validate the `args` of an application.

    Raises:
        ConfigError: One line for each mistake, naming the key, the value and what is allowed.
    """
    return parse_strictly(ServiceConfig, args)
