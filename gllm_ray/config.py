"""The one schema of `args` in configs/*.yaml: frozen, and strict about every key.

`ServiceConfig` is what a pipeline replica is built from. A value that cannot work raises
`ConfigError`, one line a mistake; nothing is coerced, ignored or silently replaced.
"""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from gllm_ray.errors import ConfigError

PACKAGE_SCHEME = "package://"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def _parse_bytes(value: object) -> object:
    """Turn `"4GiB"` into bytes; leave anything else for the type check."""
    if isinstance(value, str):
        number = value.rstrip("BiKMGT ")
        unit = value[len(number) :].strip()
        try:
            return int(float(number) * _UNITS[unit])
        except (KeyError, ValueError):
            raise ValueError("must be a number of bytes, or text such as 512MiB or 4GiB") from None
    return value


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


ByteSize = Annotated[int, BeforeValidator(_parse_bytes), Field(ge=1)]
LayerSplit = Annotated[
    Literal["auto"] | tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_list_to_tuple)
]


class _Settings(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class ModelConfig(_Settings):
    """Which model, and how its weights are read."""

    path: str = Field(
        min_length=1,
        description="A directory, a Hugging Face model id, or package://<package>/<directory>.",
    )
    served_name: str | None = Field(
        default=None, min_length=1, description="The name clients use; null: `path` as written."
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="Where the tokenizer lies; null: with the model."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of a Hugging Face model id."
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors", description="dummy: seeded random weights; only config.json is read."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of weights, KV cache and activations; auto: as in config.json."
    )
    max_model_len: int | None = Field(
        default=None, ge=1, description="Prompt and output tokens a sequence may have; null: all."
    )

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_name or self.path


class PipelineConfig(_Settings):
    """How many stages, and where each runs."""

    num_stages: int = Field(default=1, ge=1, le=256, description="Stage actors in the chain.")
    layers: LayerSplit = Field(
        default="auto",
        description="Decoder layers per stage; auto weighs embedding and head.",
    )
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="Where every stage runs.")
    gpus_per_stage: float = Field(
        default=1.0, gt=0, le=1, description="GPUs a stage reserves when on cuda."
    )
    cpus_per_stage: float = Field(
        default=1.0, gt=0, description="CPUs a stage reserves."
    )
    accelerator_type: str | None = Field(
        default=None, min_length=1, description="Ray's accelerator type of each stage, e.g. L40S."
    )
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        default="PACK", description="How Ray lays the replica's bundles over nodes."
    )
    activation_transport: Literal["auto", "nccl", "gloo", "object_store"] = Field(
        default="auto",
        description="How hidden states travel; auto: nccl on cuda, gloo on cpu.",
    )
    max_in_flight: int | None = Field(
        default=None, ge=1, description="Micro-batches in flight; null: as many as stages."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers != "auto" and len(self.layers) != self.num_stages:
            raise ValueError(
                f"layers={list(self.layers)}: lists {len(self.layers)} stages, must list "
                f"num_stages={self.num_stages}"
            )
        if self.activation_transport == "nccl" and self.device == "cpu":
            raise ValueError("activation_transport='nccl': needs device=cuda; use gloo on cpu")
        if self.accelerator_type is not None and self.device == "cpu":
            raise ValueError(
                f"accelerator_type={self.accelerator_type!r}: needs device=cuda; must be null on cpu"
            )
        return self


class KvCacheConfig(_Settings):
    """The paged KV cache of every stage."""

    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens a block holds.")
    memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="GPU memory for weights and KV cache."
    )
    kv_cache_bytes: ByteSize | None = Field(
        default=None, description="KV cache of one stage; needed on cpu; on cuda it replaces "
        "memory_utilization.",
    )


class TokenThrottlingConfig(_Settings):
    """gLLM's token throttling; the symbols are the paper's."""

    name: Literal["token_throttling"] = "token_throttling"
    max_prefill_tokens: int = Field(default=2048, ge=1, description="#MaxP: prefill upper bound.")
    min_prefill_tokens: int = Field(default=32, ge=1, description="#MinP: prefill lower bound.")
    prefill_iterations: int = Field(
        default=8, ge=1, description="#T: micro-batches over which waiting tokens are spread."
    )
    kv_threshold: float = Field(
        default=0.05, ge=0, lt=1, description="KVt: free share that stops prefill."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_prefill_tokens > self.max_prefill_tokens:
            raise ValueError(
                f"min_prefill_tokens={self.min_prefill_tokens}: must be at most "
                f"max_prefill_tokens={self.max_prefill_tokens}"
            )
        return self


class SchedulerConfig(_Settings):
    """The global scheduler."""

    policy: TokenThrottlingConfig = Field(
        default=TokenThrottlingConfig(), description="How many tokens a micro-batch may hold."
    )
    max_decodes: int = Field(default=512, ge=1, description="Decodes in one micro-batch.")


class DeploymentConfig(_Settings):
    """How Ray Serve runs the replicas, one pipeline each."""

    min_replicas: int = Field(default=1, ge=0, description="Fewest replicas.")
    max_replicas: int = Field(default=1, ge=1, description="Most replicas.")
    target_ongoing_requests: float = Field(
        default=64, gt=0, description="Requests a replica should hold on average."
    )
    max_ongoing_requests: int = Field(
        default=1024, ge=1, description="Requests a replica takes before Serve queues them."
    )
    graceful_shutdown_timeout_s: float = Field(
        default=60, ge=0, description="Seconds running requests get to finish."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: must be at most "
                f"max_replicas={self.max_replicas}"
            )
        return self


class ServiceConfig(_Settings):
    """All of `args`: what one replica of the service is built from."""

    model: ModelConfig
    pipeline: PipelineConfig = PipelineConfig()
    kv_cache: KvCacheConfig = KvCacheConfig()
    scheduler: SchedulerConfig = SchedulerConfig()
    deployment: DeploymentConfig = DeploymentConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.pipeline.device == "cpu" and self.kv_cache.kv_cache_bytes is None:
            raise ValueError(
                "kv_cache.kv_cache_bytes=null: must be set when pipeline.device is cpu, e.g. 1GiB"
            )
        return self


def parse_service_config(args: dict[str, Any]) -> ServiceConfig:
    """Validate the `args` of an application.

    Raises:
        ConfigError: One line for each mistake, naming the key, the value and what is allowed.
    """
    try:
        return ServiceConfig.model_validate(args)
    except ValidationError as error:
        raise ConfigError("\n".join(describe_mistakes(error))) from None


def describe_mistakes(error: ValidationError, prefix: str = "") -> list[str]:
    """One line a mistake: `key=value: what is allowed`."""
    return list(dict.fromkeys(_describe(dict(item), prefix) for item in error.errors()))


def _describe(item: dict[str, Any], prefix: str) -> str:
    # pydantic puts the tags of a union's members into the path; they are no keys of the file.
    location = [part for part in item["loc"] if not _is_union_tag(part)]
    key = prefix + ".".join(str(part) for part in location)
    if item["type"] == "extra_forbidden":
        return f"{key}={item['input']!r}: unknown key"
    if item["type"] == "missing":
        return f"{key}: required, but not given"
    reason = item["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    if item["type"] == "value_error" and isinstance(item["input"], dict | BaseModel):
        return f"{key}.{reason}" if key else reason
    return f"{key}={item['input']!r}: must be {reason.removeprefix('must be ')}"


def _is_union_tag(part: object) -> bool:
    return isinstance(part, str) and ("[" in part or "(" in part)


def resolve_package_path(path: str) -> str:
    """Replace `package://pkg/dir` by the directory inside the installed package.

    Raises:
        ConfigError: There is no such package.
    """
    if not path.startswith(PACKAGE_SCHEME):
        return path
    from importlib.util import find_spec

    package, _, directory = path.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"model.path={path!r}: there is no package {package!r}")
    return str(Path(spec.origin).parent / directory)
