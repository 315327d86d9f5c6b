"""How many KV blocks a set of sequences will need at once, from their predicted lengths."""

from bisect import bisect_left

from gllm_ray.scheduling.load import SequenceLoad

# Future moments, in blocks that a sequence has grown by: each at most an eighth after the last.
_GRID = (*range(1, 8), *((8 + step) << octave for octave in range(24) for step in range(8)))


class KvForecast:
    """The peak KV of sequences that decode in step, each up to its predicted end.

    ```
    U(f)   sum of ceil((len + min(f, p)) / block_size) over the sequences that reach moment f
    peak   max of U(f) over a grid of moments
    ```

    `len` are the tokens of a sequence and `p` those it is expected to add. It reaches every moment
    of the grid up to the first that is not before its end, and is left out after that. So one
    sequence is exact, none is ever left out of all moments, and the peak is never below that of a
    step-by-step evaluation. It is above by at most an eighth or one block a sequence, whichever is
    more: those that end between two moments count as if they ended together.

    Blocks that several sequences share would count for each. `set_used_blocks` tells what they hold
    together, and the same share of their blocks is taken to be common from then on.

    Moments are whole blocks apart, so a sequence adds the same to each moment before its end. One
    is therefore added in constant time, and only the peak walks over the grid.

    Source: TD-Pipe (arXiv:2506.10470), greedy prefill; its code has eleven moments, drops a
        sequence at the last one before its end, and so loses those that have outgrown their
        prediction.
    """

    def __init__(self, block_size: int) -> None:
        self._block_size = block_size
        # For each moment, over the sequences that end there: number, blocks held, blocks at the end
        self._counts = [0] * len(_GRID)
        self._held = [0] * len(_GRID)
        self._final = [0] * len(_GRID)
        self._shared_ratio = 0.0  # of the blocks held
        self._peak_limit = 0  # never below the peak

    def add(self, sequence: SequenceLoad) -> None:
        """Count a sequence from now on."""
        size, num_tokens = self._block_size, sequence.num_tokens
        num_expected = sequence.num_expected_tokens
        moment = bisect_left(_GRID, -(-num_expected // size))
        final = -(-(num_tokens + num_expected) // size)
        self._counts[moment] += 1
        self._held[moment] += -(-num_tokens // size)
        self._final[moment] += final
        self._peak_limit += final

    def set_used_blocks(self, num_blocks: int) -> None:
        """Tell how many blocks the sequences added so far really hold now."""
        held = sum(self._held)
        self._shared_ratio = max(0.0, 1 - num_blocks / held) if held else 0.0

    def peak_blocks(self) -> int:
        """Most blocks that all sequences hold at one moment."""
        peak = num_later = held = 0
        for moment in range(len(_GRID) - 1, -1, -1):
            if self._counts[moment]:
                held += self._held[moment]
                growth = self._final[moment] - self._held[moment] + num_later * _GRID[moment]
                num_later += self._counts[moment]
                peak = max(peak, held + growth - int(held * self._shared_ratio))
        self._peak_limit = peak
        return peak

    def reaches(self, num_blocks: float) -> bool:
        """Whether the peak is `num_blocks` or more; cheap while it is far below."""
        return self._peak_limit >= num_blocks and self.peak_blocks() >= num_blocks
