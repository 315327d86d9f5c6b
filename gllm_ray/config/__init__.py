"""The one schema of `args` in configs/*.yaml: frozen, and strict about every key.

`ServiceConfig` is what a pipeline replica is built from. A value that cannot work raises
`ConfigError`, one line a mistake; nothing is coerced, ignored or silently replaced.
"""

from gllm_ray.config.frontend import (
    FRONT_END_NAME,
    FrontEndConfig,
    ModelsConfig,
    args_schema,
    deployment_name,
)
from gllm_ray.config.kv_cache import KvCacheConfig
from gllm_ray.config.model import (
    PACKAGE_SCHEME,
    AttentionName,
    ModelConfig,
    ToolParserName,
    resolve_package_path,
)
from gllm_ray.config.pipeline import PipelineConfig
from gllm_ray.config.recovery import RecoveryConfig
from gllm_ray.config.scheduler import SchedulerConfig
from gllm_ray.config.service import ServiceConfig, kv_cache_of, parse_service_config

__all__ = [
    "FRONT_END_NAME",
    "PACKAGE_SCHEME",
    "AttentionName",
    "FrontEndConfig",
    "KvCacheConfig",
    "ModelConfig",
    "ModelsConfig",
    "PipelineConfig",
    "RecoveryConfig",
    "SchedulerConfig",
    "ServiceConfig",
    "ToolParserName",
    "args_schema",
    "deployment_name",
    "kv_cache_of",
    "parse_service_config",
    "resolve_package_path",
]
