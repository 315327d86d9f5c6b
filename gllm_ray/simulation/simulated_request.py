"""One request of a workload, and the tokens it stands for."""

from dataclasses import dataclass

from gllm_ray.messages import GenerationRequest

STOP_TOKEN_ID = 1
FILLER_TOKEN_ID = 0
# Even from here on mark requests, odd ones prefixes.
_FIRST_MARKER = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class SimulatedRequest:
    """When a request comes, and how long it and its answer are.

    Attributes:
        arrival_s: Seconds since the workload began.
        num_prompt_tokens: At least 1, the shared prefix included.
        num_output_tokens: At which the answer ends by itself; at least 1.
        max_tokens: Output the client allows; None: exactly `num_output_tokens`, so that the
            scheduler knows the length of the answer.
        expected_output_tokens: What the client says of the answer's length; None: nothing.
        prefix_id: Which prefix the prompt shares with others; None: no prefix.
        num_prefix_tokens: Length of that prefix, at most `num_prompt_tokens`.
        tenant: Who shares prefill fairly with other tenants.
        priority: Lower is served first.
    """

    arrival_s: float
    num_prompt_tokens: int
    num_output_tokens: int
    max_tokens: int | None = None
    expected_output_tokens: int | None = None
    prefix_id: int | None = None
    num_prefix_tokens: int = 0
    tenant: str = ""
    priority: int = 0


def to_generation_request(request: SimulatedRequest, index: int) -> GenerationRequest:
    """What the scheduler sees of a request.

    Prompts have exactly their prefix in common: a marker begins each prefix, another the rest of
    each prompt, and all other tokens are the same one, which costs no memory of its own. With
    `max_tokens`, the answer ends at `STOP_TOKEN_ID`, which only `output_token_id` tells.

    Args:
        request: The request.
        index: Its position in the workload, which names it and marks its prompt.
    """
    num_own_tokens = request.num_prompt_tokens - request.num_prefix_tokens
    prompt = _marked(_FIRST_MARKER + 2 * index, num_own_tokens)
    if request.prefix_id is not None:
        prefix_marker = _FIRST_MARKER + 2 * request.prefix_id + 1
        prompt = _marked(prefix_marker, request.num_prefix_tokens) + prompt
    is_length_known = request.max_tokens is None
    return GenerationRequest(
        request_id=str(index),
        prompt_token_ids=prompt,
        max_tokens=request.num_output_tokens if request.max_tokens is None else request.max_tokens,
        stop_token_ids=frozenset() if is_length_known else frozenset({STOP_TOKEN_ID}),
        expected_output_tokens=request.expected_output_tokens,
        tenant=request.tenant,
        priority=request.priority,
    )


def output_token_id(request: SimulatedRequest, position: int) -> int:
    """The output token at a position, from 0: `STOP_TOKEN_ID` is the answer's last."""
    return STOP_TOKEN_ID if position + 1 >= request.num_output_tokens else FILLER_TOKEN_ID


def _marked(marker: int, num_tokens: int) -> tuple[int, ...]:
    return ((marker,) + (FILLER_TOKEN_ID,) * (num_tokens - 1))[:num_tokens]
