"""The one schema of `args` in configs/*.yaml: frozen, and strict about every key.

`ServiceConfig` is what a pipeline replica is built from. A value that cannot work raises
`ConfigError`, one line a mistake; nothing is coerced, ignored or silently replaced.
"""

import os
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gllm_ray.autoscaling_config import AutoscalingConfig, ScalingRule
from gllm_ray.errors import ConfigError
from gllm_ray.policy_config import PolicyConfig, TokenThrottlingConfig
from gllm_ray.predictor_config import LengthPredictorConfig, StatisticsPredictorConfig
from gllm_ray.strict_schema import StrictModel, parse_strictly

PACKAGE_SCHEME = "package://"
_PACKAGE_PATH = re.compile(r"package://[A-Za-z_]\w*/.+")
_BYTES = "a positive number of bytes or text such as 512MiB"
_UNITS = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


def _parse_bytes(value: object) -> object:
    """Turn `"4GiB"` into bytes; leave anything else for the type check."""
    if isinstance(value, str) and (match := re.fullmatch(r"(\d{1,9}(?:\.\d+)?) ?(\w+)", value)):
        return int(float(match[1]) * _UNITS.get(match[2], 0))
    return value


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


ByteSize = Annotated[
    int,
    BeforeValidator(_parse_bytes),
    Field(ge=1, json_schema_extra={"allowed": _BYTES}),
]
LayerSplit = Annotated[
    Literal["auto"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=256)],
    BeforeValidator(_list_to_tuple),
]


AttentionName = Literal["auto", "triton", "xformers", "flash3", "torch", "cpp"]
_GPU_ATTENTION = ("triton", "xformers", "flash3")


class ModelConfig(StrictModel):
    """Which model, and how its weights are read."""

    path: str = Field(
        min_length=1,
        description="A directory, a Hugging Face id, or `package://<package>/<directory>`.",
    )
    served_name: str | None = Field(
        default=None, min_length=1, description="The name clients use; null: `path` as written."
    )
    tokenizer: str | None = Field(
        default=None, min_length=1, description="Where the tokenizer lies; null: with the model."
    )
    revision: str | None = Field(
        default=None, min_length=1, description="Branch, tag or commit of a Hugging Face id."
    )
    load_format: Literal["safetensors", "dummy"] = Field(
        default="safetensors", description="dummy: seeded random weights; only config.json is read."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="Of weights, KV cache and activations; auto: as in config.json, but on cpu "
        "float32 for float16.",
    )
    quantization: Literal["int8"] | None = Field(
        default=None,
        description="int8: weights of linear layers are stored as int8 with a scale for each "
        "output; cpu only. null: none.",
    )
    attention_backend: AttentionName = Field(
        default="auto",
        description="triton: our own kernels; xformers for decodes, with triton; flash3: "
        "FlashAttention-3; torch: slow, and takes everything; cpp: our own operator for cpu. auto: "
        "triton or cpp, by the device, else torch.",
    )
    enforce_eager: bool = Field(
        default=False,
        description="Compute decodes without CUDA graphs, as other micro-batches are.",
    )
    max_model_len: int | None = Field(
        default=None,
        ge=1,
        description="Prompt and output tokens of a sequence; null: what the model was made for.",
    )

    @property
    def name(self) -> str:
        """The model's name in the API."""
        return self.served_name or self.path

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.path.startswith(PACKAGE_SCHEME) and not _PACKAGE_PATH.fullmatch(self.path):
            raise ValueError(f"path={self.path!r}: must be package://<package>/<directory>")
        is_directory = self.path.startswith((PACKAGE_SCHEME, "/", ".", "~"))
        if self.revision is not None and (is_directory or os.path.isdir(self.path)):
            raise ValueError(
                f"revision={self.revision!r}: must be left out when path is a directory"
            )
        return self


Resources = dict[Annotated[str, Field(min_length=1)], Annotated[float, Field(gt=0)]]


def _check_resources(resources: Resources) -> None:
    for name in resources.keys() & {"CPU", "GPU", "memory", "object_store_memory"}:
        raise ValueError(
            f"resources.{name}={resources[name]:g}: must be a resource of the cluster's own; see "
            "cpus_per_stage and gpus_per_stage"
        )


class StageConfig(StrictModel):
    """What one stage has of its own; null: what all stages have."""

    accelerator_type: str | None = Field(
        default=None, min_length=1, description="Its accelerator type, instead of the pipeline's."
    )
    resources: Resources | None = Field(
        default=None, description="What it reserves of Ray's custom resources, likewise."
    )
    memory_utilization: float | None = Field(
        default=None, gt=0, le=1, description="Instead of that of kv_cache."
    )
    kv_cache_bytes: ByteSize | None = Field(default=None, description="Instead of either.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        _check_resources(self.resources or {})
        if self.kv_cache_bytes is not None and self.memory_utilization is not None:
            raise ValueError(
                f"memory_utilization={self.memory_utilization}: must be left out when "
                "kv_cache_bytes is given"
            )
        return self


class PipelineConfig(StrictModel):
    """How many stages, and where each runs."""

    num_stages: int = Field(default=1, ge=1, le=256, description="Stage actors in the chain.")
    layers: LayerSplit = Field(
        default="auto",
        description="Decoder layers per stage; auto weighs embedding and head.",
    )
    device: Literal["cuda", "cpu"] = Field(default="cuda", description="Where every stage runs.")
    gpus_per_stage: float = Field(
        default=1.0, gt=0, le=1, description="GPUs a stage reserves on cuda."
    )
    cpus_per_stage: float = Field(
        default=1.0, gt=0, description="CPUs a stage reserves; its threads on cpu."
    )
    accelerator_type: str | None = Field(
        default=None, min_length=1, description="Ray's accelerator type of each stage, e.g. L40S."
    )
    resources: Resources = Field(
        default={}, description="Ray's custom resources that each stage reserves, by name."
    )
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = Field(
        default=(), description="What differs between stages, one entry for each; []: nothing."
    )
    placement_strategy: Literal["PACK", "STRICT_PACK", "SPREAD", "STRICT_SPREAD"] = Field(
        default="PACK", description="How Ray lays the replica's bundles over nodes."
    )
    activation_transport: Literal["auto", "nccl", "gloo", "object_store"] = Field(
        default="auto",
        description="How hidden states travel; auto: nccl between whole GPUs, else gloo.",
    )
    max_in_flight: int | None = Field(
        default=None,
        ge=1,
        description="Micro-batches in flight; null: as many as stages, and one "
        "more for balanced while prompts queue.",
    )
    ring: bool = Field(
        default=False,
        description="Whether a decode may be submitted before its token has come from the last "
        "stage: it goes on to the first one by itself. One more micro-batch is then in flight.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.layers != "auto" and len(self.layers) != self.num_stages:
            raise ValueError(
                f"layers={list(self.layers)}: must list num_stages={self.num_stages} stages, "
                f"not {len(self.layers)}"
            )
        _check_resources(self.resources)
        if len(self.stages) not in (0, self.num_stages):
            raise ValueError(
                f"stages={{...}}: must list num_stages={self.num_stages} stages, not "
                f"{len(self.stages)}"
            )
        if self.activation_transport == "nccl" and self.device == "cpu":
            raise ValueError(
                "activation_transport='nccl': must be auto, gloo or object_store when device is cpu"
            )
        if self.activation_transport == "nccl" and self.gpus_per_stage < 1:
            raise ValueError(
                "activation_transport='nccl': must be auto, gloo or object_store when "
                f"gpus_per_stage={self.gpus_per_stage} lets stages share a GPU"
            )
        for key in ("accelerator_type", "gpus_per_stage"):
            value = getattr(self, key)
            if self.device == "cpu" and key in self.model_fields_set and value is not None:
                raise ValueError(f"{key}={value!r}: must be left out when device is cpu")
        for index, stage in enumerate(self.stages):
            for key in ("accelerator_type", "memory_utilization"):
                value = getattr(stage, key)
                if self.device == "cpu" and value is not None:
                    raise ValueError(
                        f"stages[{index}].{key}={value!r}: must be left out when device is cpu"
                    )
        return self

    def stage(self, stage_id: int) -> StageConfig:
        """What a stage has, of its own or like all of them."""
        own = self.stages[stage_id] if self.stages else StageConfig()
        shared = {"accelerator_type": self.accelerator_type, "resources": self.resources}
        return own.model_copy(
            update={key: value for key, value in shared.items() if getattr(own, key) is None}
        )


class KvCacheConfig(StrictModel):
    """The paged KV cache of every stage."""

    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens a block holds.")
    memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU for weights, activations and KV cache."
    )
    kv_cache_bytes: ByteSize | None = Field(
        default=None,
        description="KV cache of one stage, instead of memory_utilization; required on cpu.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kv_cache_bytes is not None and "memory_utilization" in self.model_fields_set:
            raise ValueError(
                f"memory_utilization={self.memory_utilization}: must be left out when "
                "kv_cache_bytes is given"
            )
        return self


class SchedulerConfig(StrictModel):
    """The global scheduler."""

    policy: PolicyConfig = Field(
        default=TokenThrottlingConfig(), description="How many tokens a micro-batch may hold."
    )
    max_decodes: int = Field(default=512, ge=1, description="Decodes in one micro-batch.")
    prefix_caching: bool = Field(
        default=True, description="Compute the common prefix of prompts once, and keep its KV."
    )
    max_waiting_requests: int | None = Field(
        default=None,
        ge=1,
        description="Requests that may wait for KV blocks, every output counted; one more is "
        "refused with 429. null: no limit.",
    )
    max_waiting_tokens: int | None = Field(
        default=None,
        ge=1,
        description="Prompt tokens that may wait to be computed; a request that adds more is "
        "refused with 429, unless nothing waits. null: no limit.",
    )
    queue_timeout_s: float | None = Field(
        default=None,
        gt=0,
        description="Seconds a request may wait for its first micro-batch, then it ends with 429; "
        "its own queue_timeout_s comes first. null: no limit.",
    )
    fair_share: bool = Field(
        default=False,
        description="Users, as requests name them, share prefill tokens evenly.",
    )
    cost_calibration: str | None = Field(
        default=None,
        min_length=1,
        description="File of a calibrated cost model; null: learnt from measured stage times.",
    )
    length_predictor: LengthPredictorConfig = Field(
        default=StatisticsPredictorConfig(), description="How long outputs are expected to be."
    )
    length_log: str | None = Field(
        default=None,
        min_length=1,
        description="A file on the node of the replica to which each request that ends adds a "
        "line, to train a classifier from; null: none.",
    )
    length_log_max_bytes: ByteSize = Field(
        default=16 * 2**20, description="Size at which `length_log` stops growing."
    )

    @property
    def max_batch_tokens(self) -> int:
        """Most tokens of a micro-batch."""
        return self.policy.max_batch_tokens(self.max_decodes)


class RecoveryConfig(StrictModel):
    """What happens when a stage or the scheduler dies or hangs."""

    enabled: bool = Field(
        default=True,
        description="Replace a stage or scheduler that is lost, and go on with every request; "
        "false: they end with an error, and Serve replaces the replica.",
    )
    max_attempts: int = Field(
        default=8,
        ge=1,
        description="Faults in a row that are recovered from; one more and Serve replaces the "
        "replica.",
    )
    backoff_s: float = Field(
        default=0.5,
        ge=0,
        description="Seconds before the second attempt in a row; they double with each.",
    )
    max_backoff_s: float = Field(default=30, ge=0, description="Most seconds before an attempt.")
    calm_s: float = Field(
        default=60, gt=0, description="Seconds after which a new fault is the first in a row."
    )
    restart_timeout_s: float = Field(
        default=600,
        gt=0,
        description="Seconds to place a new stage or scheduler, load it and connect it.",
    )
    heartbeat_s: float = Field(
        default=1,
        gt=0,
        description="Seconds between two questions whether a stage or the scheduler lives.",
    )
    heartbeat_timeout_s: float = Field(
        default=10,
        gt=0,
        description="Seconds without an answer after which a stage or the scheduler hangs.",
    )
    step_timeout_s: float = Field(
        default=120,
        gt=0,
        description="Seconds a stage may compute a micro-batch of 1024 tokens or fewer before it "
        "hangs; in proportion for larger ones.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.backoff_s > self.max_backoff_s:
            raise ValueError(
                f"backoff_s={self.backoff_s:g}: must be <= max_backoff_s={self.max_backoff_s:g}"
            )
        return self


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
                f"kv_cache.kv_cache_bytes=null: must be {_BYTES} when pipeline.device is cpu"
            )
        if self.model.quantization is not None and self.pipeline.device != "cpu":
            raise ValueError(
                f"model.quantization={self.model.quantization!r}: must be null when "
                f"pipeline.device is {self.pipeline.device}"
            )
        if self.model.enforce_eager and self.pipeline.device == "cpu":
            raise ValueError(
                "model.enforce_eager=true: must be left out when pipeline.device is cpu"
            )
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


def resolve_package_path(path: str) -> str:
    """Replace `package://pkg/dir` by the directory inside the installed package.

    Raises:
        ConfigError: There is no such package.
    """
    if not path.startswith(PACKAGE_SCHEME):
        return path
    package, _, directory = path.removeprefix(PACKAGE_SCHEME).partition("/")
    spec = find_spec(package)
    if spec is None or spec.origin is None:
        raise ConfigError(f"{path}: must name an installed package, and {package!r} is none")
    return str(Path(spec.origin).parent / directory)
