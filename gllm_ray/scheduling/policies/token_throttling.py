"""gLLM's token throttling: prefill and decode budgets set apart, each from global state."""

from math import ceil

from gllm_ray.config import TokenThrottlingConfig
from gllm_ray.scheduling.policies.base import LoadView, TokenBudget


class TokenThrottlingPolicy:
    """Spreads waiting prompt tokens and running decodes evenly over micro-batches.

    ```
    waiting term   WP / T
    KV term        MaxP * (KVfree - KVt) / (1 - KVt)
    prefill        max(min(waiting term, KV term), MinP), and 0 where KVfree < KVt
    decodes        RD / S
    ```

    Source: Guo et al., "gLLM", SC '25 (arXiv:2504.14775), Eqs. 1-4. Deviations:
        the waiting term is rounded up and bounded by MaxP;
        with one stage there is nothing to balance, so the waiting term does not apply, as in
        the authors' code;
        the remainder of RD / S rotates over the micro-batches, and fewer decodes than stages
        go one by one, as in the authors' code, so that they overlap.
    """

    def __init__(self, config: TokenThrottlingConfig) -> None:
        self._config = config

    def budget(self, view: LoadView) -> TokenBudget:
        """Apply both equations to the view."""
        return TokenBudget(
            prefill_tokens=self._prefill_tokens(view),
            decodes=self._decodes(view),
            reserved_blocks=ceil(self._config.kv_threshold * view.num_blocks),
        )

    def _prefill_tokens(self, view: LoadView) -> int:
        config = self._config
        headroom = (view.kv_free_ratio - config.kv_threshold) / (1 - config.kv_threshold)
        if headroom < 0:
            return 0
        kv_term = round(config.max_prefill_tokens * headroom)
        waiting_term = config.max_prefill_tokens
        if view.num_stages > 1:
            waiting_term = min(
                waiting_term, ceil(view.num_waiting_tokens / config.prefill_iterations)
            )
        return max(min(waiting_term, kv_term), config.min_prefill_tokens)

    def _decodes(self, view: LoadView) -> int:
        if view.num_decoding < view.num_stages:
            return 1
        rotation = view.batch_id % view.num_stages
        return (view.num_decoding + rotation) // view.num_stages
