"""How many replicas there should be."""

from dataclasses import dataclass
from math import ceil


@dataclass(slots=True, kw_only=True)
class Autoscaler:
    """Ray Serve's rule: so many that each holds `target_ongoing_requests` on average.

    A change is made once it has been wanted for a while without a break.

    Attributes:
        min_replicas: Fewest.
        max_replicas: Most.
        target_ongoing_requests: Requests a replica should hold.
        upscale_delay_s: How long more must have been wanted.
        downscale_delay_s: How long fewer must have been wanted.
        interval_s: Seconds between two looks.
        startup_s: Seconds until a new replica takes requests.
    """

    min_replicas: int
    max_replicas: int
    target_ongoing_requests: float
    upscale_delay_s: float = 30.0
    downscale_delay_s: float = 600.0
    interval_s: float = 10.0
    startup_s: float = 60.0
    _wanted_since_s: float | None = None
    _is_up: bool = False

    def num_replicas(self, num_requests: int, num_replicas: int, now_s: float) -> int:
        """Replicas from now on, given the requests that all of them hold."""
        wanted = ceil(num_requests / self.target_ongoing_requests)
        wanted = min(max(wanted, self.min_replicas), self.max_replicas)
        if wanted == num_replicas:
            self._wanted_since_s = None
            return num_replicas
        is_up = wanted > num_replicas
        if self._wanted_since_s is None or is_up != self._is_up:
            self._wanted_since_s, self._is_up = now_s, is_up
        delay_s = self.upscale_delay_s if is_up else self.downscale_delay_s
        if now_s - self._wanted_since_s < delay_s:
            return num_replicas
        self._wanted_since_s = None
        return wanted
