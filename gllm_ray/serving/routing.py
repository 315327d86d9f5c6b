"""The prefix-aware router inside the handles of Ray Serve."""

from collections.abc import Sequence
from random import Random

from ray.serve.request_router import (
    PendingRequest,
    ReplicaID,
    ReplicaResult,
    RequestRouter,
    RunningReplica,
)

from gllm_ray.messages import GenerationRequest
from gllm_ray.routing import PrefixRouter, RoutedPrompt

_UNKNOWN_TOKENS = 1024  # the length of a prompt that cannot be seen


class PrefixAwareRequestRouter(RequestRouter):
    """Routes by what a handle call shows.

    A `GenerationRequest` shows its prompt. An HTTP request shows the router no body, only a session
    in its `x-session-id` header: its prompts are taken to begin alike.
    """

    def initialize_state(self) -> None:
        """Called by Serve, once for each handle."""
        self._router = PrefixRouter[ReplicaID](Random())
        self._costs: dict[str, float] = {}  # of requests that have not ended

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """The best replica, and for when it is full all others."""
        if pending_request is None:
            return [candidate_replicas]
        # Otherwise Serve would try again without a pause while all are full.
        pending_request.routing_context.should_backoff = True
        replicas = {each.replica_id: each for each in candidate_replicas}
        best = self._router.choose(list(replicas), _prompt(pending_request))
        return [[replicas.pop(best)], list(replicas.values())]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: ReplicaResult
    ) -> None:
        """Called by Serve when a replica has taken a request."""
        request_id = pending_request.metadata.internal_request_id
        self._costs[request_id] = self._router.start(replica_id, _prompt(pending_request))

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        """Called by Serve when a request ends, or was not taken."""
        self._router.end(replica_id, self._costs.pop(internal_request_id, 0.0))

    def update_replicas(self, replicas: Sequence[RunningReplica]) -> None:
        """Called by Serve when replicas come or go."""
        for replica_id in self._replicas.keys() - {each.replica_id for each in replicas}:
            self._router.forget(replica_id)
        super().update_replicas(replicas)


def _prompt(request: PendingRequest) -> RoutedPrompt:
    if request.args and isinstance(request.args[0], GenerationRequest):
        generation = request.args[0]
        return RoutedPrompt.of_tokens(generation.prompt_token_ids, generation.cache_salt)
    session_id = request.metadata.session_id
    return RoutedPrompt(
        num_tokens=_UNKNOWN_TOKENS,
        keys=(session_id,) if session_id else (),
        tokens_per_key=_UNKNOWN_TOKENS,
    )
