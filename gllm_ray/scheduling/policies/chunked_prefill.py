"""Sarathi-Serve's stall-free scheduling: decodes first, prefill takes what is left."""

from math import ceil

from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.scheduling.load import LoadView
from gllm_ray.scheduling.policies.base import TokenBudget


class ChunkedPrefillPolicy:
    """Fills each micro-batch up to one token budget that decodes and prefill share.

    ```
    decodes    all that are ready
    prefill    max(0, B - decodes); prompts under way first, then waiting ones
    ```

    Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
        Sarathi-Serve", OSDI '24, Algorithm 3. Deviations from the authors' code:
        its remainder B - decodes may be negative;
        consecutive chunks of one prompt follow each other through the stages;
        sequences are not limited in number, `max_decodes` limits the decodes of a micro-batch;
        the watermark is rounded up to a block.
    """

    def __init__(self, config: ChunkedPrefillConfig) -> None:
        self._config = config

    @property
    def max_prefill_tokens(self) -> int:
        """Most prompt tokens that `budget` ever allows."""
        return self._config.token_budget

    def budget(self, view: LoadView) -> TokenBudget:
        """Take every ready decode."""
        return TokenBudget(
            prefill_tokens=self._config.token_budget,
            decodes=view.num_ready,
            reserved_blocks=ceil(self._config.watermark * view.num_blocks),
            is_shared=True,
        )
