"""The outputs under way that have a grammar, at the stage that draws tokens.

A sequence's matcher is made where its prompt ends, from the output so far, and advances by each
token that is drawn. So it starts anew after a preemption, and wherever another stage, scheduler or
replica goes on with the output.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence

import numpy as np
import torch
from llguidance import LLExecutor, LLMatcher
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask_par

from gllm_ray.errors import ConfigError, InvalidRequestError
from gllm_ray.messages import ScheduledSequence
from gllm_ray.model.grammar import GrammarCompiler
from gllm_ray.model.inputs import to_device

logger = logging.getLogger(__name__)

Rows = Mapping[int, ScheduledSequence]  # of the logits, those of sequences with a grammar


class RunningGrammars:
    """One matcher for each sequence with a grammar, from the end of its prompt to its own end.

    Args:
        load_compiler: Called when the first one comes, because it may take seconds.
    """

    def __init__(self, load_compiler: Callable[[], GrammarCompiler]) -> None:
        self._load_compiler = load_compiler
        self._compiler: GrammarCompiler | None = None
        self._executor: LLExecutor | None = None
        self._matchers: dict[int, LLMatcher | None] = {}  # None: the output takes no more tokens

    def __len__(self) -> int:
        return len(self._matchers)

    def clear(self) -> None:
        """Forget all sequences."""
        self._matchers.clear()

    def forget(self, seq_ids: Sequence[int]) -> None:
        """Forget sequences that ended; unknown ones are ignored."""
        for seq_id in seq_ids:
            self._matchers.pop(seq_id, None)

    def restrict(self, logits: torch.Tensor, rows: Rows) -> tuple[torch.Tensor, dict[int, str]]:
        """Leave only tokens in the rows that may come next.

        Returns:
            The logits, minus infinity where a token may not come; and the rows whose grammar cannot
            be followed, and why.
        """
        failures = {}
        for row, sequence in rows.items():
            if sequence.output_token_ids is not None:
                try:
                    matcher = self._begin(sequence)
                except InvalidRequestError as error:
                    matcher, failures[row] = None, str(error)
                except ConfigError:  # of which clients learn nothing, for it names files
                    logger.exception("no output can follow a grammar")
                    matcher, failures[row] = None, "grammars cannot be followed by this service now"
                self._matchers[sequence.seq_id] = matcher
        matchers = {row: self._matchers[sequence.seq_id] for row, sequence in rows.items()}
        running = {row: matcher for row, matcher in matchers.items() if matcher is not None}
        if not running:
            return logits, failures
        index = to_device(np.array([*running]), logits.device)
        is_refused = to_device(self._refused(running.values(), logits.shape[-1]), logits.device)
        allowed = logits[index].masked_fill_(is_refused, -torch.inf)
        return logits.index_put((index,), allowed), failures

    def advance(self, rows: Rows, token_ids: Sequence[int]) -> dict[int, str]:
        """Note what was drawn, after `restrict`.

        Returns:
            The rows whose grammar cannot be followed any more, and why.
        """
        failures = {}
        for row, sequence in rows.items():
            matcher = self._matchers[sequence.seq_id]
            if matcher is None:
                continue
            is_followed = not matcher.is_error() and self._follow(matcher, token_ids[row])
            if not is_followed:
                failures[row] = matcher.get_error()
            if not is_followed or token_ids[row] in self._compiler.end_token_ids:
                self._matchers[sequence.seq_id] = None
        return failures

    def _begin(self, sequence: ScheduledSequence) -> LLMatcher:
        if self._compiler is None:
            self._compiler = self._load_compiler()
            self._executor = LLExecutor()
        matcher = self._compiler.compile(sequence.sampling.grammar)
        matcher.consume_tokens(sequence.output_token_ids)
        return matcher

    def _follow(self, matcher: LLMatcher, token_id: int) -> bool:
        if token_id in self._compiler.text_end_ids and matcher.is_accepting():
            return True  # it ends the output, whose text may not go on with it
        return matcher.consume_token(token_id)

    def _refused(self, matchers: Collection[LLMatcher], vocab_size: int) -> np.ndarray:
        """Of each matcher the tokens that may not come next, bool `[matchers, vocab_size]`."""
        num_tokens = self._compiler.tokenizer.vocab_size
        bits = allocate_token_bitmask(len(matchers), num_tokens)
        numbered = [(matcher, number) for number, matcher in enumerate(matchers)]
        fill_next_token_bitmask_par(self._executor, numbered, bits)
        is_allowed = np.unpackbits(bits.view(np.uint8), axis=1, bitorder="little", count=num_tokens)
        for allowed, matcher in zip(is_allowed, matchers, strict=True):
            if allowed[self._compiler.special_ids].any():
                self._compiler.respell(matcher, allowed)
            if allowed[self._compiler.text_end_ids].any() and not matcher.is_accepting():
                allowed[self._compiler.text_end_ids] = 0  # as a text, it would end the output early
        is_refused = np.ones((len(matchers), vocab_size), dtype=bool)
        width = min(num_tokens, vocab_size)
        is_refused[:, :width] = is_allowed[:, :width] == 0
        return is_refused
