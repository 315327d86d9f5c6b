"""Which tokens the sequences with penalties have, at the stage that draws tokens.

As a grammar's matcher does, the counts of a sequence begin where its prompt ends, from its output
so far, and grow by each token that is drawn.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from gllm_ray.messages import ScheduledSequence


class TokenCounts:
    """How often the output of a sequence has each of its tokens, and each of its prompt's.

    Args:
        prompt_token_ids: Each counts 0 until the output has it, too.
        output_token_ids: The output so far.
    """

    def __init__(self, prompt_token_ids: Iterable[int], output_token_ids: Iterable[int]) -> None:
        prompt = np.unique(np.fromiter(prompt_token_ids, dtype=np.int32))
        self._num_prompt = self._size = len(prompt)
        self._columns = np.stack([prompt, np.zeros_like(prompt)])  # with room for more
        self._places: dict[int, int] = {}  # of the tokens of the output
        for token_id in output_token_ids:
            self.add(token_id)

    @property
    def columns(self) -> np.ndarray:
        """Token ids, each once, and how often the output has each; int32 `[2, tokens]`."""
        return self._columns[:, : self._size]

    def add(self, token_id: int) -> None:
        """Count a token of the output."""
        place = self._places.get(token_id)
        if place is None:
            place = self._places[token_id] = self._find(token_id)
        self._columns[1, place] += 1

    def _find(self, token_id: int) -> int:
        """The place of a token that is new to the output."""
        prompt = self._columns[0, : self._num_prompt]
        place = int(prompt.searchsorted(token_id))
        if place < self._num_prompt and prompt[place] == token_id:
            return place
        if self._size == self._columns.shape[1]:
            room = np.zeros((2, max(16, self._size)), dtype=np.int32)
            self._columns = np.concatenate([self._columns, room], axis=1)
        self._columns[0, self._size] = token_id
        self._size += 1
        return self._size - 1


class RunningCounts:
    """The counts of each sequence with penalties, from the end of its prompt to its own end."""

    def __init__(self) -> None:
        self._counts: dict[int, TokenCounts] = {}

    def __len__(self) -> int:
        return len(self._counts)

    def clear(self) -> None:
        """Forget all sequences."""
        self._counts.clear()

    def forget(self, seq_ids: Sequence[int]) -> None:
        """Forget sequences that ended; unknown ones are ignored."""
        for seq_id in seq_ids:
            self._counts.pop(seq_id, None)

    def of(self, sequence: ScheduledSequence) -> TokenCounts:
        """The counts of a sequence with penalties, which whoever draws for it goes on with."""
        if sequence.output_token_ids is not None:
            counts = TokenCounts(sequence.prompt_token_ids, sequence.output_token_ids)
            self._counts[sequence.seq_id] = counts
        return self._counts[sequence.seq_id]
