"""How long an output will be: the seam, and the two predictors that need no file."""

from typing import Protocol

from gllm_ray.messages import GenerationRequest


class LengthPredictor(Protocol):
    """Predicts output lengths; a pure function of the requests it was asked about and shown."""

    def predict(self, request: GenerationRequest) -> int | None:
        """Output tokens the request will have in all, or None if there is nothing to go by."""

    def observe(self, request: GenerationRequest, num_output_tokens: int) -> None:
        """Learn from a request that ended by itself, with `stop` or `length`."""
