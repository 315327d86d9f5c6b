"""Which tokens end an output, and what a body asks for that comes before the temperature."""

import re

from gllm_ray.messages import LogitRules
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.openai_protocol import GenerationParams
from gllm_ray.serving.token_ids import check_token_ids, unknown_token

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")


def stop_token_ids(body: GenerationParams, tokenizer: Tokenizer) -> frozenset[int]:
    """The client's own, and the model's unless they are to be ignored.

    Raises:
        InvalidRequestError: The model has no such token.
    """
    wanted = frozenset(body.stop_token_ids or ())
    check_token_ids("stop_token_ids", wanted, tokenizer.vocab_size)
    return wanted if body.ignore_eos else wanted | tokenizer.stop_token_ids


def logit_rules(
    body: GenerationParams, tokenizer: Tokenizer, stop_token_ids: frozenset[int]
) -> LogitRules | None:
    """All rules but `min_end`, which the prompt's length decides; None: there is none.

    Raises:
        InvalidRequestError: A bias is for a token that the model does not have.
    """
    repetition_penalty = body.repetition_penalty
    if repetition_penalty is None:
        repetition_penalty = tokenizer.sampling_defaults.repetition_penalty
    # As in vLLM, the model's own may not come early even where they do not count as an end.
    ends = stop_token_ids | tokenizer.stop_token_ids if body.min_tokens else ()
    rules = LogitRules(
        end_token_ids=tuple(sorted(ends)),
        logit_bias=_biases(body.logit_bias or {}, tokenizer),
        repetition_penalty=repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
    )
    return None if rules == LogitRules() else rules


def _biases(biases: dict[str, float], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    for token in biases:
        if not _TOKEN_ID.fullmatch(token) or int(token) >= tokenizer.vocab_size:
            raise unknown_token("logit_bias", token, tokenizer.vocab_size)
    return tuple((int(token), bias) for token, bias in biases.items())
