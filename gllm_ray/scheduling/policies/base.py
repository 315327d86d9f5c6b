"""What a policy decides."""

from dataclasses import dataclass
from math import ceil
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
    """

    prefill_tokens: int
    decodes: int
    reserved_blocks: int = 0
    is_shared: bool = False
    decode_load: float | None = None
    decode_weight: float = 0.0

    def __post_init__(self) -> None:
        assert self.prefill_tokens >= 0, "negative prefill budget"
        assert self.decodes >= 0, "negative decode budget"


class Policy(Protocol):
    """Chooses the size of the next micro-batch; a pure function of the views so far."""

    @property
    def max_prefill_tokens(self) -> int:
        """Most prompt tokens that `budget` ever allows."""

    def budget(self, view: LoadView) -> TokenBudget:
        """Decide what the next micro-batch may hold.

        Called at each `schedule` that may still submit, whether or not a micro-batch comes of it;
        `view.batch_id` tells which views did lead to one.
        """


def head_fits(view: LoadView, reserved_blocks: int) -> bool:
    """Whether a prompt waits and would be admitted, whatever the prefix cache knows of it."""
    if view.head is None:
        return False
    num_blocks = ceil(view.head.num_tokens / view.block_size) + reserved_blocks
    return num_blocks <= view.num_free_blocks or view.num_free_blocks == view.num_blocks
