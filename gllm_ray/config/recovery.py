"""What happens after a fault."""

from typing import Self

from pydantic import Field, model_validator

from gllm_ray.strict_schema import StrictModel


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
