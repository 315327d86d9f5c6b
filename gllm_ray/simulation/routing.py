"""Which replica a request goes to."""

from collections.abc import Sequence
from random import Random
from typing import Literal, Protocol

RoutingName = Literal["round_robin", "least_outstanding", "power_of_two"]


class ReplicaLoad(Protocol):
    """What a router may know of a replica."""

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""


class Router:
    """Chooses among the replicas that take requests.

    Args:
        name: `round_robin`; `least_outstanding`, the fewest requests; `power_of_two`, the fewer of
            two drawn ones, as Ray Serve does.
        rng: Draws them.
    """

    def __init__(self, name: RoutingName, rng: Random) -> None:
        self._name = name
        self._rng = rng
        self._num_chosen = 0

    def choose(self, replicas: Sequence[ReplicaLoad]) -> int:
        """The index of the replica for the next request; there is at least one."""
        self._num_chosen += 1
        if self._name == "round_robin":
            return (self._num_chosen - 1) % len(replicas)
        candidates: Sequence[int] = range(len(replicas))
        if self._name == "power_of_two" and len(replicas) > 2:
            candidates = sorted(self._rng.sample(candidates, 2))
        return min(candidates, key=lambda index: replicas[index].num_requests)
