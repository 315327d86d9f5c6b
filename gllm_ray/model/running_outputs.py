"""The outputs under way whose draws depend on their tokens, at the stage that draws.

As a grammar's matcher does, what is known of an output begins where its prompt ends, from its
tokens so far, and grows by each token that is drawn.
"""

from collections.abc import Sequence

from gllm_ray.messages import ScheduledSequence
from gllm_ray.model.bad_words import BadWords
from gllm_ray.model.token_counts import TokenCounts


class RunningOutput:
    """What the logit rules of a sequence need to know of its output.

    Args:
        sequence: Its chunk that ends the prompt.

    Attributes:
        counts: Its tokens, where there are penalties.
        bad_words: How near it is to one, where there are any.
    """

    def __init__(self, sequence: ScheduledSequence) -> None:
        rules, output = sequence.sampling.logit_rules, sequence.output_token_ids
        self.counts: TokenCounts | None = None
        self.bad_words: BadWords | None = None
        if rules.has_penalties:
            self.counts = TokenCounts(sequence.prompt_token_ids, output)
        if rules.bad_words:
            self.bad_words = BadWords(rules.bad_words, output)

    def add(self, token_id: int) -> None:
        """Note a token that was drawn."""
        for known in (self.counts, self.bad_words):
            if known is not None:
                known.add(token_id)


class RunningOutputs:
    """Those of each sequence whose logit rules depend on it, from its prompt's end to its own."""

    def __init__(self) -> None:
        self._outputs: dict[int, RunningOutput] = {}

    def __len__(self) -> int:
        return len(self._outputs)

    def clear(self) -> None:
        """Forget all sequences."""
        self._outputs.clear()

    def forget(self, seq_ids: Sequence[int]) -> None:
        """Forget sequences that ended; unknown ones are ignored."""
        for seq_id in seq_ids:
            self._outputs.pop(seq_id, None)

    def of(self, sequence: ScheduledSequence) -> RunningOutput:
        """The output of such a sequence, which whoever draws for it goes on with."""
        if sequence.output_token_ids is not None:
            self._outputs[sequence.seq_id] = RunningOutput(sequence)
        return self._outputs[sequence.seq_id]
