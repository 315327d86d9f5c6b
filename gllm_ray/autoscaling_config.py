"""When replicas come and go: what `deployment.autoscaling` and a simulation's may hold."""

from typing import Self

from pydantic import Field, model_validator

from gllm_ray.strict_schema import StrictModel


class AutoscalingConfig(StrictModel):
    """What a replica should bear, and how soon their number follows."""

    target_queue_time_s: float = Field(
        default=2.0,
        gt=0,
        description="Seconds that prompts should wait, as predicted from the tokens that wait and "
        "the rate at which a replica has worked off others; longer starts another replica.",
    )
    target_prefill_utilization: float = Field(
        default=0.8,
        gt=0,
        le=1,
        description="Share of that rate, as it was while at least half of the KV blocks were "
        "free, at which prompts should come to a replica.",
    )
    target_kv_utilization: float = Field(
        default=0.8, gt=0, le=1, description="Share of its KV blocks that should be in use."
    )
    max_growth: float = Field(
        default=2.0,
        gt=1,
        description="Replicas that a queue may start at once, counted with those that run, for "
        "each that runs.",
    )
    upscale_delay_s: float = Field(
        default=10.0, ge=0, description="Seconds for which more must have been wanted."
    )
    downscale_delay_s: float = Field(
        default=600.0, ge=0, description="Seconds for which fewer must have been wanted."
    )
    interval_s: float = Field(
        default=5.0, gt=0, description="Seconds between two reports of a replica."
    )


class ScalingRule(AutoscalingConfig):
    """All that decides on the number of replicas."""

    min_replicas: int = Field(default=1, ge=0, description="Fewest.")
    max_replicas: int = Field(ge=1, description="Most.")
    target_ongoing_requests: float = Field(
        default=64, gt=0, description="Requests a replica should hold on average."
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas={self.min_replicas}: must be <= max_replicas={self.max_replicas}"
            )
        return self
