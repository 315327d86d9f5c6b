"""What becomes of replicas in a simulation: their number changes, and their stages die."""

from typing import Self

from pydantic import Field, model_validator

from gllm_ray.strict_schema import StrictModel


class AutoscalingConfig(StrictModel):
    """Ray Serve's rule for the number of replicas."""

    min_replicas: int = Field(default=1, ge=1, description="Fewest.")
    max_replicas: int = Field(ge=1, description="Most.")
    target_ongoing_requests: float = Field(
        default=64, gt=0, description="Requests a replica should hold on average."
    )
    upscale_delay_s: float = Field(
        default=30.0, ge=0, description="How long more must have been wanted."
    )
    downscale_delay_s: float = Field(
        default=600.0, ge=0, description="How long fewer must have been wanted."
    )
    interval_s: float = Field(default=10.0, gt=0, description="Seconds between two looks.")
    startup_s: float = Field(
        default=60.0, ge=0, description="Seconds until a new replica takes requests."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: must be <= max_replicas={self.max_replicas}"
            )
        return self


class StageLossConfig(StrictModel):
    """A stage that dies, and is replaced."""

    time_s: float = Field(ge=0, description="When.")
    replica_id: int = Field(default=0, ge=0, description="Whose stage, of those at the start.")
    recovery_s: float = Field(
        default=30.0,
        ge=0,
        description="Seconds until it is replaced; the replica's requests wait, and their KV is "
        "computed again.",
    )
