"""What a policy decides."""

from dataclasses import dataclass
from math import ceil, inf
from typing import Protocol

from gllm_ray.scheduling.load import LoadView


@dataclass(slots=True, kw_only=True)
class TokenBudget:
    """How much the next micro-batch may hold.

    Attributes:
        prefill_tokens: At most this many prompt tokens.
        decodes: At most this many decodes, one token each.
        reserved_blocks: Blocks that admitting a waiting sequence must leave free.
        is_shared: Each decode in the micro-batch takes one from `prefill_tokens`.
        decode_load: Decodes stop once the sum of their contexts and weights, in tokens, reaches
            this; None: their number alone counts.
        decode_weight: What a decode costs beside reading its context, in context tokens.
        long_output: Waiting sequences that are expected to produce at least so many tokens are
            admitted first, the longest before the others.
    """

    prefill_tokens: int
    decodes: int
    reserved_blocks: int = 0
    is_shared: bool = False
    decode_load: float | None = None
    decode_weight: float = 0.0
    long_output: float = inf

    def __post_init__(self) -> None:
        assert self.prefill_tokens >= 0, "negative prefill budget"
        assert self.decodes >= 0, "negative decode budget"


class Policy(Protocol):
    """Chooses the size of the next micro-batch; a pure function of the views so far."""

    @property
    def max_prefill_tokens(self) -> int:
        """Most prompt tokens that `budget` ever allows."""

    @property
    def num_ahead(self) -> int:
        """Micro-batches that it may want in flight beyond the stages."""

    @property
    def overtaking(self) -> float:
        """Tokens of later prompts that may pass a prompt, for each of its own; 0: none pass."""

    def budget(self, view: LoadView) -> TokenBudget:
        """Decide what the next micro-batch may hold.

        Called at each `schedule` that may still submit, whether or not a micro-batch comes of it;
        `view.batch_id` tells which views did lead to one.
        """


class InOrder:
    """Of policies that serve prompts as they come, with as many micro-batches as stages."""

    num_ahead = 0
    overtaking = 0.0


def head_fits(view: LoadView, reserved_blocks: int) -> bool:
    """Whether a prompt waits and would be admitted, whatever the prefix cache knows of it."""
    if view.head is None:
        return False
    num_blocks = ceil(view.head.num_tokens / view.block_size) + reserved_blocks
    return num_blocks <= view.num_free_blocks or view.num_free_blocks == view.num_blocks
