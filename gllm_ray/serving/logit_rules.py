"""Which tokens end an output, and what a body asks for that comes before the temperature."""

import re
from collections.abc import Iterable

from gllm_ray.errors import InvalidRequestError
from gllm_ray.messages import LogitRules
from gllm_ray.model.tokenizer import Tokenizer
from gllm_ray.serving.openai_protocol import GenerationParams
from gllm_ray.serving.token_ids import check_token_ids, unknown_token

_TOKEN_ID = re.compile("0|[1-9][0-9]{0,9}")
# Of all bad words, each with and without a space before it.
_MAX_BAD_WORD_TOKENS = 1024

BadWordTokens = tuple[tuple[int, ...], ...]


def stop_token_ids(body: GenerationParams, tokenizer: Tokenizer) -> frozenset[int]:
    """The client's own, and the model's unless they are to be ignored.

    Raises:
        InvalidRequestError: The model has no such token.
    """
    wanted = frozenset(body.stop_token_ids or ())
    check_token_ids("stop_token_ids", wanted, tokenizer.vocab_size)
    return wanted if body.ignore_eos else wanted | tokenizer.stop_token_ids


def bad_word_tokens(words: Iterable[str], tokenizer: Tokenizer) -> BadWordTokens:
    """How an output may spell words: at its beginning, or after another word.

    Deviation: vLLM leaves out the word after a space where that has more tokens, or fewer.

    Raises:
        InvalidRequestError: One of them has no token, or all together have too many.
    """
    spellings: set[tuple[int, ...]] = set()
    for word in words:
        bare = word.lstrip()
        alone, after_space = (
            tuple(tokenizer.encode(text, add_special_tokens=False)) for text in (bare, f" {bare}")
        )
        if not alone:
            raise InvalidRequestError(
                f"bad_words has {word[:64]!r}, which has no token but white space; use logit_bias "
                "to rule out tokens",
                param="bad_words",
            )
        spellings |= {alone, after_space}
    num_tokens = sum(map(len, spellings))
    if num_tokens > _MAX_BAD_WORD_TOKENS:
        raise InvalidRequestError(
            f"bad_words come to {num_tokens} tokens, with and without a space before each; the "
            f"limit is {_MAX_BAD_WORD_TOKENS}, so send fewer or shorter ones",
            param="bad_words",
        )
    return tuple(sorted(spellings))


def logit_rules(
    body: GenerationParams,
    tokenizer: Tokenizer,
    stop_token_ids: frozenset[int],
    bad_words: BadWordTokens = (),
) -> LogitRules | None:
    """All rules but `min_end`, which the prompt's length decides; None: there is none.

    Raises:
        InvalidRequestError: One is for a token that the model does not have, or they leave none.
    """
    allowed = frozenset(body.allowed_token_ids or ())
    check_token_ids("allowed_token_ids", allowed, tokenizer.vocab_size)
    repetition_penalty = body.repetition_penalty
    if repetition_penalty is None:
        repetition_penalty = tokenizer.sampling_defaults.repetition_penalty
    # As in vLLM, the model's own may not come early even where they do not count as an end.
    ends = stop_token_ids | tokenizer.stop_token_ids if body.min_tokens else frozenset()
    if allowed:
        _check_leaves_some(allowed, bad_words, ends)
    rules = LogitRules(
        allowed_token_ids=tuple(sorted(allowed)),
        bad_words=bad_words,
        end_token_ids=tuple(sorted(ends)),
        logit_bias=_biases(body.logit_bias or {}, tokenizer),
        repetition_penalty=repetition_penalty,
        frequency_penalty=body.frequency_penalty or 0.0,
        presence_penalty=body.presence_penalty or 0.0,
    )
    return None if rules == LogitRules() else rules


def _check_leaves_some(
    allowed: frozenset[int], bad_words: BadWordTokens, ends: frozenset[int]
) -> None:
    left = allowed - {word[0] for word in bad_words if len(word) == 1}
    if not left:
        raise InvalidRequestError(
            "bad_words rules out every one of allowed_token_ids; allow others, too",
            param="bad_words",
        )
    if left <= ends:
        raise InvalidRequestError(
            "min_tokens: every token that allowed_token_ids leaves would end the output; allow "
            "others, too, or leave min_tokens out",
            param="min_tokens",
        )


def _biases(biases: dict[str, float], tokenizer: Tokenizer) -> tuple[tuple[int, float], ...]:
    for token in biases:
        if not _TOKEN_ID.fullmatch(token) or int(token) >= tokenizer.vocab_size:
            raise unknown_token("logit_bias", token, tokenizer.vocab_size)
    return tuple((int(token), bias) for token, bias in biases.items())
