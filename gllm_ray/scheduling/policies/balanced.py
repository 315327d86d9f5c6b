"""Our own policy: every micro-batch takes the same predicted time."""

from math import ceil

from gllm_ray.policy_config import BalancedConfig
from gllm_ray.scheduling.cost_model import most_prefill_tokens, with_chunk
from gllm_ray.scheduling.load import LoadView, StepLoad
from gllm_ray.scheduling.policies.adaptive_reserve import AdaptiveReserve
from gllm_ray.scheduling.policies.base import TokenBudget

# How far the target may move within one round of as many micro-batches as stages. A round's
# slowest micro-batch sets its pace, so a faster move would be a bubble in every stage.
_MAX_RISE = 1.5
_MAX_FALL = 0.9
# Over so many rows, a multiple of every tile, and so much context a marginal cost is taken.
_STEP_ROWS = 256
_STEP_CONTEXT = 65_536
_MAX_WEIGHT = 1e6  # contexts then do not matter


class BalancedPolicy:
    """Brings each micro-batch to one target time, which follows the backlog.

    ```
    share     an S-th of the live decodes, by predicted cost: rows and the context they read
    backlog   waiting tokens, as far as the KV cache can take them above the reserve
    chunk     backlog / n with the n up to 2S for which (n + S - 1) * time(share + backlog / n) is
              least: n micro-batches have then brought the backlog through the pipeline; at most
              what the share leaves of token_budget
    target    time(share + chunk), a bounded change from the micro-batch before, and at most
              tbt_target_s / S
    prefill   as many tokens as bring the decodes that are ready to the target; at least
              min_prefill_tokens, which prompts under way can use however full the KV cache is
    ```

    It also holds before the cost model is calibrated; time is then a token count.
    """

    def __init__(self, config: BalancedConfig) -> None:
        self._config = config
        self._reserve = AdaptiveReserve()
        self._batch_id = -1
        # Targets of this micro-batch and the one before, over the time of one full of prefill.
        self._level = self._level_before = 0.0

    @property
    def max_prefill_tokens(self) -> int:
        """The token budget: all of it, where no decode is ready."""
        return self._config.token_budget

    def budget(self, view: LoadView) -> TokenBudget:
        """Fill up to the target, after a cost-balanced share of the decodes."""
        reserved_blocks = self._reserve.blocks(view)
        weight = _decode_weight(view)
        decodes = _decodes(view, min(view.num_ready, view.num_decoding / view.num_stages))
        target = self._target_time(view, reserved_blocks)
        prefill_tokens = max(
            self._config.min_prefill_tokens,
            most_prefill_tokens(
                view.cost, decodes, view.prefill_start, target, self._max_chunk(decodes)
            ),
        )
        total = decodes.num_decodes + prefill_tokens
        is_within = total <= self._config.token_budget
        return TokenBudget(
            # Shared, so that the total is exact whichever decodes it turns out to be.
            prefill_tokens=total if is_within else self._config.min_prefill_tokens,
            is_shared=is_within,
            decodes=view.num_ready,
            reserved_blocks=reserved_blocks,
            decode_load=_decode_load(view, weight),
            decode_weight=weight,
        )

    def _target_time(self, view: LoadView, reserved_blocks: int) -> float:
        share = _decodes(view, view.num_decoding / view.num_stages)
        free_blocks = view.kv_free_ratio * view.num_blocks - reserved_blocks
        backlog = max(0.0, min(view.num_waiting_tokens, free_blocks * view.block_size))
        target = self._bounded(view, self._wanted_time(view, share, backlog))
        if self._config.tbt_target_s is not None and view.cost.is_calibrated:
            target = min(target, self._config.tbt_target_s / view.num_stages)
        return target

    def _wanted_time(self, view: LoadView, share: StepLoad, backlog: float) -> float:
        """The time of micro-batches that bring the backlog through the pipeline soonest."""

        def time(chunk: int) -> float:
            chunk = max(chunk, self._config.min_prefill_tokens)
            chunk += -(share.num_decodes + chunk) % view.cost.tile  # which costs next to nothing
            return view.cost.stage_time(with_chunk(share, view.prefill_start, chunk))

        def drain_time(num_batches: int) -> float:
            return (num_batches + view.num_stages - 1) * time(ceil(backlog / num_batches))

        step = max(1, view.num_stages // 4)  # a handful of choices does as well as all
        soonest = min(range(1, 2 * view.num_stages + 1, step), key=drain_time)
        return time(min(ceil(backlog / soonest), self._max_chunk(share)))

    def _bounded(self, view: LoadView, target: float) -> float:
        """Keep the target near that of the micro-batch before, unless the pipeline is idle."""
        if view.batch_id != self._batch_id:
            self._batch_id, self._level_before = view.batch_id, self._level
        full = view.cost.stage_time(StepLoad(num_prefill_tokens=self._config.token_budget))
        if view.num_decoding or view.num_prefills_in_flight:
            before = self._level_before * full or target
            rise, fall = _MAX_RISE ** (1 / view.num_stages), _MAX_FALL ** (1 / view.num_stages)
            target = min(max(target, before * fall), before * rise)
        self._level = target / full
        return target

    def _max_chunk(self, decodes: StepLoad) -> int:
        """The most prefill tokens beside decodes."""
        config = self._config
        return max(config.token_budget - decodes.num_decodes, config.min_prefill_tokens)


def _decodes(view: LoadView, number: float) -> StepLoad:
    """The load of so many decodes of average context."""
    context = view.num_context_tokens * number / max(1, view.num_decoding)
    return StepLoad(num_decodes=ceil(number), num_context_tokens=round(context))


def _decode_weight(view: LoadView) -> float:
    """What a row costs, in context tokens read."""
    share = _decodes(view, view.num_decoding / view.num_stages)
    time = view.cost.stage_time(share)
    more_rows = share._replace(num_decodes=share.num_decodes + _STEP_ROWS)
    more_context = share._replace(num_context_tokens=share.num_context_tokens + _STEP_CONTEXT)
    row_time = (view.cost.stage_time(more_rows) - time) / _STEP_ROWS
    context_time = (view.cost.stage_time(more_context) - time) / _STEP_CONTEXT
    return min(row_time / context_time, _MAX_WEIGHT) if context_time > 0 else _MAX_WEIGHT


def _decode_load(view: LoadView, weight: float) -> float:
    """An S-th of all decodes; one decode more or less, so that a round takes them all."""
    mean = view.num_context_tokens / max(1, view.num_decoding) + weight
    remainder = (view.batch_id % view.num_stages + 0.5) / view.num_stages
    return max(1.0, mean * (view.num_decoding / view.num_stages - remainder))
