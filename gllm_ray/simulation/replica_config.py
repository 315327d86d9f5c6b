"""What becomes of replicas in a simulation: their number changes, and their stages die."""

from pydantic import Field

from gllm_ray.autoscaling_config import ScalingRule
from gllm_ray.strict_schema import StrictModel

MAX_REPLICAS = 10_000


class SimulatedScalingConfig(ScalingRule):
    """The service's rule for the number of replicas; it looks whenever they report."""

    max_replicas: int = Field(ge=1, le=MAX_REPLICAS, description="Most.")
    startup_s: float = Field(
        default=60.0, ge=0, description="Seconds until a new replica takes requests."
    )


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
