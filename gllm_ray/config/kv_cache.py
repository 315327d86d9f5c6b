"""The KV cache of a stage."""

from typing import Self

from pydantic import Field, model_validator

from gllm_ray.config.byte_size import ByteSize
from gllm_ray.strict_schema import StrictModel


class KvCacheConfig(StrictModel):
    """The paged KV cache of every stage."""

    block_size: int = Field(default=16, ge=1, le=1024, description="Tokens a block holds.")
    memory_utilization: float = Field(
        default=0.9, gt=0, le=1, description="Share of a GPU for weights, activations and KV cache."
    )
    kv_cache_bytes: ByteSize | None = Field(
        default=None,
        description="KV cache of one stage, instead of memory_utilization; required on cpu, where "
        "memory is taken as blocks are first used.",
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.kv_cache_bytes is not None and "memory_utilization" in self.model_fields_set:
            raise ValueError(
                f"memory_utilization={self.memory_utilization}: must be left out when "
                "kv_cache_bytes is given"
            )
        return self
