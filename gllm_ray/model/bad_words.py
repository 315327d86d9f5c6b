"""Which tokens would complete a text that must not be generated."""

from collections import deque
from collections.abc import Iterable


class BadWords:
    """The texts that an output must not have, and how it ends so far.

    Source: as vLLM has it, only the last token of a text is ever ruled out, and what counts is the
    output alone, without its prompt.

    Args:
        words: The tokens of each text, at least one.
        output_token_ids: The output so far.
    """

    def __init__(self, words: Iterable[tuple[int, ...]], output_token_ids: Iterable[int]) -> None:
        self._last_tokens: dict[tuple[int, ...], list[int]] = {}
        for word in words:
            self._last_tokens.setdefault(word[:-1], []).append(word[-1])
        self._lengths = sorted({len(beginning) for beginning in self._last_tokens})
        self._latest = deque(output_token_ids, maxlen=self._lengths[-1])

    def next_tokens(self) -> list[int]:
        """The tokens that may not come next."""
        latest = tuple(self._latest)
        endings = [latest[len(latest) - n :] for n in self._lengths if n <= len(latest)]
        return [token for ending in endings for token in self._last_tokens.get(ending, ())]

    def add(self, token_id: int) -> None:
        """Note a token of the output."""
        self._latest.append(token_id)
