"""Compiled grammars: which tokens may come next, by what an output has to match.

llguidance does the work. A matcher follows one output; its state is a function of the grammar and
the tokens it was told, so it can be made anew wherever an output goes on.
"""

from functools import lru_cache

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from gllm_ray.errors import InvalidRequestError

# Requests that follow each other often have the same grammar.
_MAX_COMPILED = 32
# Without the parser's state, which is nothing for clients.
_LIMITS = LLParserLimits(verbose_errors=False)


class GrammarCompiler:
    """Compiles grammars for the tokens of one model; safe to use from several threads.

    Args:
        tokenizer_json: What a tokenizer.json says.
        end_token_ids: Tokens that end an output, where the grammar lets it end.

    Attributes:
        end_token_ids: See above.
        tokenizer: That of llguidance.

    Raises:
        InvalidRequestError: The model has no end token, or a tokenizer of another kind.
    """

    def __init__(self, tokenizer_json: str, end_token_ids: frozenset[int]) -> None:
        if not end_token_ids:
            raise InvalidRequestError("the model has no token that ends an output")
        self.end_token_ids = end_token_ids
        try:
            self.tokenizer = LLTokenizer(tokenizer_json, eos_token=sorted(end_token_ids))
        except ValueError as error:
            raise InvalidRequestError(f"not with this model's tokenizer: {error}") from error
        self._compiled = lru_cache(_MAX_COMPILED)(self._compile)

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of an output.

        Raises:
            InvalidRequestError: The grammar has a mistake, or no output can match it.
        """
        return self._compiled(grammar).deep_copy()

    def _compile(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=_LIMITS)
        if matcher.is_error():
            raise InvalidRequestError(matcher.get_error())
        return matcher
