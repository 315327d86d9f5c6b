"""What a response costs, as OpenAI's API tells."""

from collections.abc import Sequence
from typing import Any

from gllm_ray.messages import GenerationRequest
from gllm_ray.serving.text_stream import TextDelta


class UsageMeter:
    """Counts what a response costs while its outputs grow.

    The outputs of a prompt stand side by side, and the prompt is paid for once. So what the prefix
    cache had of it counts once, too: the least that any of them found there, for the others may
    have found what that one left.

    Args:
        requests: One for each output, those of a prompt in a row.
        outputs_per_prompt: How many these are.
    """

    def __init__(self, requests: Sequence[GenerationRequest], outputs_per_prompt: int) -> None:
        prompts = [request.prompt_token_ids for request in requests[::outputs_per_prompt]]
        self._num_prompt_tokens = sum(map(len, prompts))
        self._num_output_tokens = 0
        self._outputs_per_prompt = outputs_per_prompt
        self._num_cached_tokens = [len(prompt) for prompt in prompts]  # of each, at most
        self._num_untold = len(requests)

    def add(self, delta: TextDelta) -> None:
        """Count how far an output grew."""
        self._num_output_tokens += delta.num_tokens
        if delta.num_cached_tokens is not None:
            self._num_untold -= 1
            prompt = delta.index // self._outputs_per_prompt
            least = min(self._num_cached_tokens[prompt], delta.num_cached_tokens)
            self._num_cached_tokens[prompt] = least

    def usage(self) -> dict[str, Any]:
        """What was counted so far; of cached tokens only once every output has begun."""
        cached = None if self._num_untold else {"cached_tokens": sum(self._num_cached_tokens)}
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_output_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_output_tokens,
            "prompt_tokens_details": cached,
        }
