"""What serves a simulated workload."""

from collections.abc import Callable
from dataclasses import dataclass, field

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling import Scheduler
from gllm_ray.simulation.cost_model import PipelineCost
from gllm_ray.simulation.replica_config import SimulatedScalingConfig
from gllm_ray.simulation.routing import RoutingName
from gllm_ray.simulation.virtual_pipeline import Timing


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoss:
    """A stage dies, and is replaced; meanwhile the requests of its replica wait.

    Attributes:
        time_s: When.
        replica_id: Whose stage.
        recovery_s: Seconds until the replica goes on, with a prefill of all that it held.

    To a replica that is not running at that time nothing happens.
    """

    time_s: float
    replica_id: int = 0
    recovery_s: float = 30.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """What serves the workload.

    Attributes:
        cost: The time of each stage, the same for all replicas.
        make_scheduler: A new scheduler for each replica.
        timing: Of everything else.
        num_replicas: At the start.
        routing: Which replica a request goes to.
        scaling: When their number changes; None: it stays.
        losses: Stages that die.

    Raises:
        ConfigError: There is never a replica.
    """

    cost: PipelineCost
    make_scheduler: Callable[[], Scheduler]
    timing: Timing = field(default_factory=Timing)
    num_replicas: int = 1
    routing: RoutingName = "power_of_two"
    scaling: SimulatedScalingConfig | None = None
    losses: tuple[StageLoss, ...] = ()

    def __post_init__(self) -> None:
        if self.num_replicas < 1 and self.scaling is None:
            raise ConfigError(
                f"num_replicas={self.num_replicas}: must be at least 1 without autoscaling"
            )
