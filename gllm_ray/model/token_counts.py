"""Which tokens a sequence with penalties has, and how often."""

from collections.abc import Iterable

import numpy as np


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
