"""How many replicas there should be."""

from dataclasses import dataclass
from math import ceil

from gllm_ray.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Autoscaler:
    """Ray Serve's rule: so many that each holds `target_ongoing_requests` on average.

    A change is made once it has been wanted for a while without a break; from no replica to the
    first one it is made at once.

    Source: Ray Serve, `replica_queue_length_autoscaling_policy`. Deviations: requests are counted
        when it looks, not averaged over the time before, and the factors that speed a change up
        or slow it down are 1.

    Attributes:
        min_replicas: Fewest.
        max_replicas: Most; at least 1.
        target_ongoing_requests: Requests a replica should hold.
        upscale_delay_s: How long more must have been wanted.
        downscale_delay_s: How long fewer must have been wanted.
        interval_s: Seconds between two looks.
        startup_s: Seconds until a new replica takes requests.

    Raises:
        ConfigError: There can never be a replica, or it never looks.
    """

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    interval_s: float = 10.0
    startup_s: float = 60.0

    def __post_init__(self) -> None:
        if not max(1, self.min_replicas) <= self.max_replicas:
            raise ConfigError(
                f"min_replicas={self.min_replicas}, max_replicas={self.max_replicas}: "
                "max_replicas must be at least 1, and at least min_replicas"
            )
        if not (self.interval_s > 0 and self.target_ongoing_requests > 0):
            raise ConfigError(
                f"interval_s={self.interval_s}, "
                f"target_ongoing_requests={self.target_ongoing_requests}: must be > 0"
            )


class ReplicaCount:
    """Follows an autoscaler's rule from look to look.

    Args:
        autoscaler: The rule.
    """

    def __init__(self, autoscaler: Autoscaler) -> None:
        self._autoscaler = autoscaler
        self._wanted_since_s: float | None = None
        self._is_up = False

    def next(self, num_requests: int, num_replicas: int, now_s: float) -> int:
        """Replicas from now on, given how many there are and the requests that all hold."""
        rule = self._autoscaler
        wanted = ceil(num_requests / rule.target_ongoing_requests)
        wanted = min(max(wanted, rule.min_replicas), rule.max_replicas)
        if wanted == num_replicas:
            self._wanted_since_s = None
            return num_replicas
        if num_replicas == 0:
            return max(1, rule.min_replicas)
        is_up = wanted > num_replicas
        if self._wanted_since_s is None or is_up != self._is_up:
            self._wanted_since_s, self._is_up = now_s, is_up
        delay_s = rule.upscale_delay_s if is_up else rule.downscale_delay_s
        if now_s - self._wanted_since_s < delay_s:
            return num_replicas
        self._wanted_since_s = None
        return wanted
