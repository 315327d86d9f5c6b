"""How many KV blocks to keep free for running sequences, learnt from preemptions."""

from math import ceil

from gllm_ray.scheduling.load import LoadView

_INITIAL_RATIO = 0.7
_MIN_RATIO = 0.1
_MAX_RATIO = 1.0
_DECAY = 0.002  # a micro-batch
_RISE = 0.05  # a preemption


class AdaptiveReserve:
    """Expects running sequences to produce a share of the output tokens they may still produce.

    The share falls with each micro-batch and rises with each preemption, within its limits.

    Source: github.com/gty111/gLLM at bc91d98, which follows SGLang. Deviation: the tokens are
        summed before they are rounded up to blocks, so that a micro-batch costs the same for any
        number of sequences; the free slots of last blocks, which the authors subtract, cancel what
        their rounding up adds on average.
    """

    def __init__(self) -> None:
        self._ratio = _INITIAL_RATIO
        self._batch_id = 0
        self._num_preemptions = 0

    def blocks(self, view: LoadView) -> int:
        """The reserve for the next micro-batch, at least one block a stage."""
        rise = _RISE * (view.num_preemptions - self._num_preemptions)
        decay = _DECAY * (view.batch_id - self._batch_id)
        self._num_preemptions, self._batch_id = view.num_preemptions, view.batch_id
        self._ratio = max(_MIN_RATIO, min(_MAX_RATIO, self._ratio + rise) - decay)
        needed = ceil(self._ratio * view.num_remaining_tokens / view.block_size)
        return max(view.num_stages, needed)
