"""Which replica a request goes to."""

from collections.abc import Hashable, Sequence
from random import Random
from typing import Literal, Protocol

from gllm_ray.routing import PrefixRouter, RoutedPrompt
from gllm_ray.simulation.simulated_request import SimulatedRequest

RoutingName = Literal["round_robin", "random", "least_outstanding", "power_of_two", "prefix_aware"]


class ReplicaLoad(Hashable, Protocol):
    """What a router may know of a replica."""

    @property
    def num_requests(self) -> int:
        """Requests accepted and not ended."""


class Router:
    """Chooses among the replicas that take requests.

    Args:
        name: `round_robin`; `random`; `least_outstanding`, the fewest requests; `power_of_two`, the
            fewer of two drawn ones, equals by chance, as Ray Serve does; `prefix_aware`, as
            `PrefixRouter` does.
        rng: Draws them.
    """

    def __init__(self, name: RoutingName, rng: Random) -> None:
        self._name = name
        self._rng = rng
        self._num_chosen = 0
        self._prefix_router = PrefixRouter[ReplicaLoad](rng) if name == "prefix_aware" else None

    def choose(self, replicas: Sequence[ReplicaLoad], request: SimulatedRequest) -> int:
        """The index of the replica for a request; there is at least one."""
        self._num_chosen += 1
        if self._prefix_router is not None:
            return replicas.index(self._prefix_router.choose(replicas, _prompt(request)))
        if self._name == "round_robin":
            return (self._num_chosen - 1) % len(replicas)
        if self._name == "random":
            return self._rng.randrange(len(replicas))
        candidates: Sequence[int] = range(len(replicas))
        if self._name == "power_of_two" and len(replicas) > 1:
            candidates = self._rng.sample(candidates, 2)
        return min(candidates, key=lambda index: replicas[index].num_requests)

    def start(self, replica: ReplicaLoad, request: SimulatedRequest) -> float:
        """A request is sent; returns what to tell when it ends."""
        if self._prefix_router is None:
            return 0.0
        return self._prefix_router.start(replica, _prompt(request))

    def end(self, replica: ReplicaLoad, cost_tokens: float) -> None:
        """A request has ended."""
        if self._prefix_router is not None:
            self._prefix_router.end(replica, cost_tokens)

    def forget(self, replica: ReplicaLoad) -> None:
        """A replica takes no more requests."""
        if self._prefix_router is not None:
            self._prefix_router.forget(replica)


def _prompt(request: SimulatedRequest) -> RoutedPrompt:
    if request.prefix_id is None:
        return RoutedPrompt(num_tokens=request.num_prompt_tokens)
    return RoutedPrompt(
        num_tokens=request.num_prompt_tokens,
        keys=(request.prefix_id,),
        tokens_per_key=request.num_prefix_tokens,
    )
