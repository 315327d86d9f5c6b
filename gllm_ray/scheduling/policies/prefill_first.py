"""Separate batching: a micro-batch holds whole prompts or decodes, and prompts go first."""

from math import ceil

from gllm_ray.policy_config import PrefillFirstConfig
from gllm_ray.scheduling.load import LoadView
from gllm_ray.scheduling.policies.base import InOrder, TokenBudget, head_fits


class PrefillFirstPolicy(InOrder):
    """Prefills whatever waits and fits, and decodes where nothing does.

    ```
    prefill    whole waiting prompts, as many as token_budget holds, and no decode
    decodes    where no prompt waits and fits: 1/S of them, the remainder in turn
    ```

    A prompt that the budget does not hold is cut, and finished before another begins: one longer
    than the budget, and one whose turn comes by its age, see `WaitingQueue`, beside others.

    Source: the baseline PP+SB of "TD-Pipe", ICPP '25 (arXiv:2506.10470), and vLLM in the
        comparison of "Sarathi-Serve", OSDI '24 (arXiv:2403.02310). Deviations from vLLM 0:
        all micro-batches share the KV cache and the decodes, where each of its virtual engines
        keeps its own; sequences are not limited in number; a prompt longer than the budget is
        not refused.
    """

    def __init__(self, config: PrefillFirstConfig) -> None:
        self._config = config

    @property
    def max_prefill_tokens(self) -> int:
        """The whole budget."""
        return self._config.token_budget

    def budget(self, view: LoadView) -> TokenBudget:
        """Prompts alone, or decodes alone."""
        if view.num_prefilling:
            return TokenBudget(
                prefill_tokens=self._config.token_budget,
                decodes=0,
                reserved_blocks=view.num_blocks,  # none but the prompt under way
            )
        watermark = ceil(self._config.watermark * view.num_blocks)
        if head_fits(view, watermark):
            tokens = self._whole_prompts(view)
            return TokenBudget(prefill_tokens=tokens, decodes=0, reserved_blocks=watermark)
        rotation = view.batch_id % view.num_stages
        decodes = (view.num_decoding + rotation) // view.num_stages
        return TokenBudget(prefill_tokens=0, decodes=max(1, decodes))

    def _whole_prompts(self, view: LoadView) -> int:
        """Tokens of the first prompts that the budget holds, or of what it holds of the first."""
        total = 0
        for sequence in view.waiting:
            if total + sequence.num_tokens > self._config.token_budget:
                break
            total += sequence.num_tokens
        return total or self._config.token_budget
