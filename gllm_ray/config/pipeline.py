"""The stages, and where each runs."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from gllm_ray.config.byte_size import ByteSize
from gllm_ray.strict_schema import StrictModel

_MAX_AHEAD = 1  # micro-batches that a policy may want beside one for each stage
# Stages on CPU have threads of their own, but share caches, memory and what serves them.
_CPU_CROWDING = 1.2


def _list_to_tuple(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value


LayerSplit = Annotated[
    Literal["auto"] | Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(max_length=256)],
    BeforeValidator(_list_to_tuple),
]
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
        description="Decoder layers per stage; auto: as even as can be, the head as half "
        "its parameters.",
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
    activation_transport: Literal["auto", "nccl", "cuda_ipc", "gloo", "object_store"] = Field(
        default="auto",
        description="How hidden states travel; cuda_ipc: within a GPU that neighbours share, gloo "
        "between others. auto: nccl between whole GPUs, cuda_ipc where stages may share one, gloo "
        "on cpu.",
    )
    control_plane: Literal["refs", "direct"] = Field(
        default="refs",
        description="How micro-batches reach the stages, and their tokens come back; refs: by "
        "calls of the actors, which Ray chains. direct: by messages of their own, which take less "
        "CPU time and less waiting.",
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

    @model_validator(mode="after")
    def _check_transport(self) -> Self:
        name, gpus = self.activation_transport, self.gpus_per_stage
        if name in ("nccl", "cuda_ipc") and self.device == "cpu":
            raise ValueError(
                f"activation_transport={name!r}: must be auto, gloo or object_store when device is "
                "cpu"
            )
        if name == "object_store" and self.control_plane == "direct":
            raise ValueError(
                "activation_transport='object_store': must be another, or auto, when "
                "control_plane='direct' leaves Ray out of it"
            )
        if name == "nccl" and gpus < 1:
            raise ValueError(
                "activation_transport='nccl': must be auto, cuda_ipc, gloo or object_store when "
                f"gpus_per_stage={gpus} lets stages share a GPU"
            )
        if name == "cuda_ipc" and gpus == 1:
            raise ValueError(
                "activation_transport='cuda_ipc': must be auto, nccl, gloo or object_store when "
                f"gpus_per_stage={gpus:g} gives each stage a GPU of its own"
            )
        return self

    @property
    def most_in_flight(self) -> int:
        """Micro-batches in flight at most, whatever the policy."""
        return (self.max_in_flight or self.num_stages + _MAX_AHEAD) + self.ring

    @property
    def crowding(self) -> float:
        """How many times longer a stage computes while all others do, too; at least 1."""
        if self.num_stages == 1:
            return 1.0
        if self.device == "cpu":
            return _CPU_CROWDING
        return min(self.num_stages, int(1 / self.gpus_per_stage))

    def stage(self, stage_id: int) -> StageConfig:
        """What a stage has, of its own or like all of them."""
        own = self.stages[stage_id] if self.stages else StageConfig()
        shared = {"accelerator_type": self.accelerator_type, "resources": self.resources}
        return own.model_copy(
            update={key: value for key, value in shared.items() if getattr(own, key) is None}
        )
