"""Which replica a request goes to: where the beginning of its prompt is cached, or least waits.

The router of a Ray Serve deployment and the simulator ask the same object.
"""

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Generic, TypeVar

Replica = TypeVar("Replica", bound=Hashable)

_TOKENS_PER_KEY = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutedPrompt:
    """What a router knows of a prompt.

    Attributes:
        num_tokens: Its length, or a guess.
        keys: One for each piece of its beginning that may be cached. Prompts that share a key share
            all pieces up to it.
        tokens_per_key: Length of a piece.
    """

    num_tokens: int
    keys: tuple[Hashable, ...] = ()
    tokens_per_key: int = _TOKENS_PER_KEY

    @classmethod
    def of_tokens(cls, token_ids: Sequence[int], salt: str = "") -> "RoutedPrompt":
        """All that can be known of a prompt.

        Two prompts may have equal keys by chance, which costs one of them a detour.

        Args:
            token_ids: The prompt.
            salt: Only prompts of the same salt share anything.
        """
        keys, key = [], hash(salt)
        for start in range(0, len(token_ids) - _TOKENS_PER_KEY + 1, _TOKENS_PER_KEY):
            key = hash((key, tuple(token_ids[start : start + _TOKENS_PER_KEY])))
            keys.append(key)
        return cls(num_tokens=len(token_ids), keys=tuple(keys))


class PrefixRouter(Generic[Replica]):
    """Sends a request where it and what is there already are predicted to take least.

    It compares three replicas: two drawn ones, and of those that hold most of the prompt's
    beginning the one with the least work. What a replica has cached counts as no work, so a request
    follows its prefix until the queue there costs more than computing the prefix elsewhere; from
    then on that is cached in two places.

    Work is counted in prompt tokens. It is that of the requests sent from here and not ended, for a
    replica tells too late what it holds.

    Source: Mitzenmacher, "The power of two choices in randomized load balancing" (2001), and the
        exploitation and exploration of Preble (Srivatsa et al., arXiv:2407.00023), section 3.1.
        Deviations: one predicted cost decides between the two, and no load is measured.

    Args:
        rng: Draws the two.
        max_keys: Of each replica, those last used that are remembered.
        request_tokens: Prompt tokens that weigh as much as generating an answer.
    """

    def __init__(
        self, rng: Random, *, max_keys: int = 16_384, request_tokens: float = 64.0
    ) -> None:
        self._rng = rng
        self._max_keys = max_keys
        self._request_tokens = request_tokens
        self._work: dict[Replica, float] = {}
        self._keys: dict[Replica, OrderedDict[Hashable, None]] = {}
        self._holders: dict[Hashable, dict[Replica, None]] = {}

    def choose(self, replicas: Sequence[Replica], prompt: RoutedPrompt) -> Replica:
        """The replica for a request, out of at least one."""
        candidates = self._rng.sample(replicas, min(2, len(replicas)))
        holder = self._best_holder(replicas, prompt)
        if holder is not None:
            candidates.insert(0, holder)  # among equals it is taken
        return min(candidates, key=lambda each: self.work_of(each) + self.cost_tokens(each, prompt))

    def work_of(self, replica: Replica) -> float:
        """What it has been sent and not ended."""
        return self._work.get(replica, 0.0)

    def cost_tokens(self, replica: Replica, prompt: RoutedPrompt) -> float:
        """What a request will cost there."""
        held, num_held = self._keys.get(replica, ()), 0
        for key in prompt.keys:
            if key not in held:
                break
            num_held += 1
        num_cached = min(num_held * prompt.tokens_per_key, prompt.num_tokens)
        return prompt.num_tokens - num_cached + self._request_tokens

    def start(self, replica: Replica, prompt: RoutedPrompt) -> float:
        """A request is sent; returns its cost, to be told when it ends."""
        cost_tokens = self.cost_tokens(replica, prompt)
        self._work[replica] = self.work_of(replica) + cost_tokens
        held = self._keys.setdefault(replica, OrderedDict())
        # The first keys are used last, so that they outlive those that need them.
        for key in reversed(prompt.keys):
            held[key] = None
            held.move_to_end(key)
            self._holders.setdefault(key, {})[replica] = None
        while len(held) > self._max_keys:
            self._drop(replica, held.popitem(last=False)[0])
        return cost_tokens

    def end(self, replica: Replica, cost_tokens: float) -> None:
        """A request ended, one way or another."""
        if replica in self._work:
            self._work[replica] -= cost_tokens

    def forget(self, replica: Replica) -> None:
        """A replica has gone."""
        self._work.pop(replica, None)
        for key in self._keys.pop(replica, ()):
            self._drop(replica, key)

    def _best_holder(self, replicas: Sequence[Replica], prompt: RoutedPrompt) -> Replica | None:
        best: list[Replica] = []
        for key in prompt.keys:
            holders = self._holders.get(key, {})
            longer = [each for each in best or replicas if each in holders]
            if not longer:
                break
            best = longer
        return min(best, key=self.work_of) if best else None

    def _drop(self, replica: Replica, key: Hashable) -> None:
        holders = self._holders[key]
        del holders[replica]
        if not holders:
            del self._holders[key]
