"""gLLM's token throttling: prefill and decode budgets set apart, each from global state."""

from math import ceil

from gllm_ray.policy_config import TokenThrottlingConfig
from gllm_ray.scheduling.load import LoadView
from gllm_ray.scheduling.policies.adaptive_reserve import AdaptiveReserve
from gllm_ray.scheduling.policies.base import InOrder, TokenBudget

# A reserve of the whole cache would leave no scale for the KV term; the authors' limit.
_MAX_THRESHOLD = 0.99


class TokenThrottlingPolicy(InOrder):
    """Spreads waiting prompt tokens and running decodes evenly over micro-batches.

    ```
    waiting term   WP / T
    KV term        MaxP * (KVfree - KVt) / (1 - KVt)
    prefill        max(min(waiting term, KV term), MinP), and 0 where KVfree < KVt
    decodes        RD / S
    ```

    Source: Guo et al., "gLLM", SC '25 (arXiv:2504.14775), Eqs. 1-4. `TokenThrottlingConfig` has
        an option for each deviation of the authors' code. Deviations from both:
        the waiting term is rounded up and bounded by MaxP, and KVt is rounded up to a block;
        the remainder of RD / S rotates over the micro-batches by their ids, where the code draws;
        what the free blocks can hold does not bound the budget, because a prompt takes all its
        blocks when it is admitted, and leaves those below KVt free.
    """

    def __init__(self, config: TokenThrottlingConfig) -> None:
        self._config = config
        self._adaptive_reserve = AdaptiveReserve()

    @property
    def max_prefill_tokens(self) -> int:
        """Most prompt tokens that `budget` ever allows."""
        return self._config.max_prefill_tokens

    def budget(self, view: LoadView) -> TokenBudget:
        """Apply both equations to the view."""
        reserved_blocks = self._reserved_blocks(view)
        return TokenBudget(
            prefill_tokens=self._prefill_tokens(view, reserved_blocks),
            decodes=self._decodes(view),
            reserved_blocks=reserved_blocks,
        )

    def _reserved_blocks(self, view: LoadView) -> int:
        threshold = self._config.kv_threshold
        if threshold == "adaptive":
            return self._adaptive_reserve.blocks(view)
        return ceil(threshold * view.num_blocks)

    def _prefill_tokens(self, view: LoadView, reserved_blocks: int) -> int:
        config = self._config
        threshold = min(_MAX_THRESHOLD, reserved_blocks / view.num_blocks)
        headroom = (view.kv_free_ratio - threshold) / (1 - threshold)
        if headroom < 0:
            return 0
        budget = config.max_prefill_tokens
        if view.num_stages == 1 and config.one_stage == "exempt":
            return budget
        if config.prefill_iterations is not None:
            waiting_term = ceil(view.num_waiting_tokens / config.prefill_iterations)
            budget = min(budget, max(waiting_term, config.min_prefill_tokens))
        if config.kv_term:
            budget = min(budget, round(config.max_prefill_tokens * headroom))
        return max(budget, config.min_prefill_tokens) if config.floor == "budget" else budget

    def _decodes(self, view: LoadView) -> int:
        num_running = view.num_decoding
        if self._config.count_prefills:
            num_running += view.num_prefills_in_flight
        if num_running < view.num_stages:
            return 1 if self._config.few_decodes == "one" else num_running
        rotation = view.batch_id % view.num_stages
        return (num_running + rotation) // view.num_stages
