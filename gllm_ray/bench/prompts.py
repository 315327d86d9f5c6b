"""The requests of a workload with the prompts that they stand for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.simulated_request import SimulatedRequest

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Token ids that any model has, and enough of them that no two prompts begin alike by chance.
PROMPT_VOCAB_SIZE = 1000
_MAX_SPELLINGS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadRequest:
    """A request to send.

    Attributes:
        request_id: Unique among all of a benchmark.
        arrival_s: Seconds since the workload began.
        prompt: Token ids, or text that stands for about as many.
        num_prompt_tokens: Length of the prompt in tokens.
        num_output_tokens: What is asked for.
        expected_output_tokens: What is said of the output's length beforehand; None: nothing.
        tenant: Who sends it; empty: nobody in particular.
        priority: Lower is served first.
    """

    request_id: str
    arrival_s: float
    prompt: tuple[int, ...] | str
    num_prompt_tokens: int
    num_output_tokens: int
    expected_output_tokens: int | None = None
    tenant: str = ""
    priority: int = 0


def make_requests(
    workload: Iterable[SimulatedRequest],
    seed: str,
    *,
    vocab_size: int = PROMPT_VOCAB_SIZE,
    tokenizer: "Tokenizer | None" = None,
) -> list[LoadRequest]:
    """Draw the prompts of a workload.

    Prompts have their shared prefixes in common, and nothing else. Those of another seed have
    nothing in common with them, so that a workload can be repeated without finding its KV cached.

    Args:
        workload: Of which no request ends before its `max_tokens`, as no model can be told to.
        seed: Of the tokens.
        vocab_size: The ids are below it.
        tokenizer: Spells the prompts as text; None: they are token ids.

    Raises:
        ConfigError: A request of the workload is to end before its `max_tokens`.
    """
    prefixes: dict[int, tuple[int, ...]] = {}

    def draw(name: str, num_tokens: int) -> tuple[int, ...]:
        return tuple(Random(f"{seed} {name}").choices(range(vocab_size), k=num_tokens))

    def prompt_of(request: SimulatedRequest, index: int) -> tuple[int, ...]:
        own = draw(f"prompt {index}", request.num_prompt_tokens - request.num_prefix_tokens)
        if (prefix_id := request.prefix_id) is None:
            return own
        if prefix_id not in prefixes:
            prefixes[prefix_id] = draw(f"prefix {prefix_id}", request.num_prefix_tokens)
        return prefixes[prefix_id] + own

    requests = []
    for index, request in enumerate(workload):
        if request.max_tokens not in (None, request.num_output_tokens):
            raise ConfigError(
                f"workload.max_tokens={request.max_tokens}: must be null, because a model cannot "
                f"be told to end after {request.num_output_tokens} tokens by itself"
            )
        prompt = prompt_of(request, index)
        requests.append(
            LoadRequest(
                request_id=f"{seed}-{index}",
                arrival_s=request.arrival_s,
                prompt=prompt if tokenizer is None else spell(tokenizer, prompt),
                num_prompt_tokens=len(prompt),
                num_output_tokens=request.num_output_tokens,
                expected_output_tokens=request.expected_output_tokens,
                tenant=request.tenant,
                priority=request.priority,
            )
        )
    return requests


def spell(tokenizer: "Tokenizer", token_ids: Sequence[int]) -> str:
    """Text that is as many tokens, or nearly: not every sequence of tokens is what its text is."""
    wanted = len(token_ids)
    ids = list(token_ids)
    for _ in range(_MAX_SPELLINGS):
        text = tokenizer.decode(ids)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        if len(ids) == wanted:
            break
        ids = [*ids, *token_ids][:wanted]
    return text
