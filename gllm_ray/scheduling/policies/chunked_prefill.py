"""Sarathi-Serve's stall-free scheduling: decodes first, prefill takes what is left."""

from math import ceil

from gllm_ray.policy_config import ChunkedPrefillConfig
from gllm_ray.scheduling.cost_model import most_prefill_tokens
from gllm_ray.scheduling.load import LoadView, StepLoad
from gllm_ray.scheduling.policies.base import InOrder, TokenBudget

_SAFETY = 1.2  # on predicted times, as the successor's code has it
# What a deadline that cannot be kept leaves to prefill: waiting for ever would not keep it either.
_LATE_PREFILL_TOKENS = 32


class ChunkedPrefillPolicy(InOrder):
    """Fills each micro-batch up to one token budget that decodes and prefill share.

    ```
    decodes    all that are ready
    prefill    max(0, B - decodes); prompts under way first, then waiting ones
    B          token_budget; with a TBT target the largest up to it for which
               1.2 * num_stages * time(micro-batch) <= deadline - now
    deadline   tbt_target_s after the latest token of the decode that waits longest
    ```

    With a TBT target, prefill keeps 32 tokens of `token_budget` however late the decodes are.
    Until the cost model is calibrated, and while nothing decodes, B is `token_budget`.

    Source: Agrawal et al., "Taming Throughput-Latency Tradeoff in LLM Inference with
        Sarathi-Serve", OSDI '24, Algorithm 3; the TBT target follows its successor Niyama
        (ASPLOS '26). Deviations from the authors' code:
        its remainder B - decodes may be negative;
        consecutive chunks of one prompt follow each other through the stages;
        sequences are not limited in number, `max_decodes` limits the decodes of a micro-batch;
        the watermark is rounded up to a block;
        the deadline is that of a token which leaves the last of the stages, B is any number and
        not one of ten, and there is the floor of 32 tokens.
    """

    def __init__(self, config: ChunkedPrefillConfig) -> None:
        self._config = config

    @property
    def max_prefill_tokens(self) -> int:
        """The whole budget, where no decode is ready."""
        return self._config.token_budget

    def budget(self, view: LoadView) -> TokenBudget:
        """Take every ready decode."""
        return TokenBudget(
            prefill_tokens=self._token_budget(view),
            decodes=view.num_ready,
            reserved_blocks=ceil(self._config.watermark * view.num_blocks),
            is_shared=True,
        )

    def _token_budget(self, view: LoadView) -> int:
        most, tbt_target_s = self._config.token_budget, self._config.tbt_target_s
        if tbt_target_s is None or not view.num_decoding or not view.cost.is_calibrated:
            return most
        # Those in flight get their tokens before this micro-batch, and have all their time left.
        num_decodes = min(view.num_ready, view.max_decodes)
        waited_s = 0.0 if view.oldest_token_s is None else view.now_s - view.oldest_token_s
        context = view.num_context_tokens * num_decodes / view.num_decoding
        prefill_tokens = most_prefill_tokens(
            view.cost,
            StepLoad(num_decodes=num_decodes, num_context_tokens=round(context)),
            view.prefill_start,
            (tbt_target_s - waited_s) / (_SAFETY * view.num_stages),
            max(0, most - num_decodes),
        )
        return min(most, num_decodes + max(prefill_tokens, _LATE_PREFILL_TOKENS))
