"""Compiled grammars: which tokens may come next, by what an output has to match.

llguidance does the work. A matcher follows one output; its state is a function of the grammar and
the tokens it was told, so it can be made anew wherever an output goes on.
"""

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from gllm_ray.errors import InvalidRequestError

# Requests that follow each other often have the same grammar.
_MAX_COMPILED = 32
_LIMITS = {
    # Those of a position: a choice has one for each text, JSON several for each optional property.
    "max_items_in_row": 40_000,
    # Work on regular expressions at the beginning. 400 optional groups take less than 20,000;
    # llguidance's own 1,000,000 lets the longest of a request take 40 s and 3 GiB, to be refused.
    "initial_lexer_fuel": 200_000,
    "verbose_errors": False,  # Clients know nothing of the parser's state.
}
# Parser items of a step, which bound the time of a mask: the most ambiguous grammars take 2 s with
# this many, and four times as long with llguidance's own 50,000.
_MAX_STEP_ITEMS = 20_000
# JSON takes less time for each: 500 optional properties have as many where there are 100,000
# tokens, in 0.1 s; the most ambiguous schemas take 1.6 s.
_MAX_JSON_STEP_ITEMS = 100_000
# llguidance compiles a rule within the rule that names it. The deepest grammars that a request may
# have take 300 MiB; what a thread does not touch is address space only.
_STACK_BYTES = 512 * 2**20
_stack_size_lock = threading.Lock()
# How llguidance marks special tokens among the bytes of texts, which UTF-8 cannot spell.
_SPECIAL_TOKEN_BYTE = b"\xff"


class GrammarCompiler:
    """Compiles grammars for the tokens of one model; safe to use from several threads.

    Args:
        tokenizer_json: What a tokenizer.json says.
        end_token_ids: Tokens that end an output, where the grammar lets it end.

    Attributes:
        end_token_ids: See above.
        special_ids: Of the tokens that stand for themselves and not for a text.
        text_end_ids: Of the end tokens that stand for a text, too.
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
        is_special = map(self.tokenizer.is_special_token, range(self.tokenizer.vocab_size))
        self.special_ids = np.flatnonzero(np.fromiter(is_special, bool))
        self.text_end_ids = np.setdiff1d(sorted(end_token_ids), self.special_ids)
        self._compiled = lru_cache(_MAX_COMPILED)(self._compile)

    def compile(self, grammar: str) -> LLMatcher:
        """A matcher at the beginning of an output.

        Raises:
            InvalidRequestError: The grammar has a mistake, or no output can match it.
        """
        return self._compiled(grammar).deep_copy()

    def respell(self, matcher: LLMatcher, allowed: np.ndarray) -> None:
        """Correct a mask that has a special token in the place of a text that spells its name.

        llguidance leaves only the first token of a text that has to come, as the tokenizer cuts it,
        and a special token's name is that token, there.

        Args:
            matcher: What the mask is of.
            allowed: The mask: of each token, 1 if it may come next and else 0.
        """
        text = matcher.compute_ff_bytes()
        if text and not text.startswith(_SPECIAL_TOKEN_BYTE):
            allowed[:] = 0
            # The name may be followed by part of a character.
            allowed[self.tokenizer.greedy_tokenize(text.decode(errors="ignore"))[0]] = 1

    def _compile(self, grammar: str) -> LLMatcher:
        with ThreadPoolExecutor(1) as executor:
            with _stack_size_lock:  # the size is that of all threads that start meanwhile
                default = threading.stack_size(_STACK_BYTES)
                try:
                    compiled = executor.submit(self._compile_deep, grammar)
                finally:
                    threading.stack_size(default)
            return compiled.result()

    def _compile_deep(self, grammar: str) -> LLMatcher:
        matcher = LLMatcher(self.tokenizer, grammar, log_level=0, limits=_limits_of(grammar))
        if matcher.is_error():
            raise InvalidRequestError(matcher.get_error())
        beginning = matcher.deep_copy()
        beginning.compute_bitmask()
        if beginning.is_error():
            reason = beginning.get_error()
            is_empty = reason.startswith("NoExtensionBias")
            raise InvalidRequestError("no output can match it" if is_empty else reason)
        return matcher


def _limits_of(grammar: str) -> LLParserLimits:
    max_items = _MAX_JSON_STEP_ITEMS if _is_json_schema(grammar) else _MAX_STEP_ITEMS
    return LLParserLimits(step_max_items=max_items, **_LIMITS)


def _is_json_schema(grammar: str) -> bool:
    """Whether it is nothing but JSON schemas, as llguidance spells them."""
    if not grammar.startswith("{"):  # so it is in Lark's syntax
        return False
    try:
        parts = json.loads(grammar)["grammars"]
        return all(part.get("json_schema") and not part.get("lark_grammar") for part in parts)
    except (ValueError, LookupError):
        return False
