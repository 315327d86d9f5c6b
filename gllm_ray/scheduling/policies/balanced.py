"""Our own policy: every micro-batch takes the same predicted time."""

from bisect import bisect_left
from math import ceil, inf
from typing import NamedTuple

from gllm_ray.policy_config import BalancedConfig
from gllm_ray.scheduling.cost_model import most_prefill_tokens, with_chunk
from gllm_ray.scheduling.load import CostModel, LoadView, StepLoad
from gllm_ray.scheduling.policies.adaptive_reserve import AdaptiveReserve
from gllm_ray.scheduling.policies.base import TokenBudget

# How far the target may move within one round of as many micro-batches as stages. A round's
# slowest micro-batch sets its pace, so a faster move would be a bubble in every stage.
_MAX_RISE = 1.5
_MAX_FALL = 0.9
# By how much a row may cost more, as a share, than one more row of a large micro-batch, where
# token_budget lets it; the rows are two tiles or more.
_MAX_EXCESS, _MAX_DEEP_EXCESS, _MIN_EXCESS = 0.6, 0.06, 0.03
# Where stages share processors, a micro-batch costs these more than the stages' time.
_MAX_CROWDED_EXCESS = 0.2
_NEARLY = 1.1  # micro-batches nine tenths full count as full
_UNCALIBRATED_ROWS = 512  # where that is not known
# What a micro-batch costs processors that stages share with each other and with whom they serve,
# beside the stages' time.
_STEP_OVERHEAD_S = 1e-3
# Rounds from which on a backlog is deep, until half of them are left. The pipeline then takes
# one more micro-batch than it has stages.
_DEEP_ROUNDS = 8
# A backlog takes so many times the rounds of micro-batches and a KV cache that are always full.
_BACKLOG_ROUNDS = 1.4
_MIN_PREFILL_SHARE = 0.25  # of the rows of these rounds, however many decodes there are
# Rounds that it takes at least to fill the KV cache: near full, prefill takes up what
# ended sequences release, evenly.
_KV_ROUNDS = 12
_NUM_SIZES = 4  # of chunks that are compared
# The largest chunk is taken whose drain takes at most this share longer than the shortest: for so
# little, fewer micro-batches are better.
_NEARLY_SOONEST = 1.05
# Steps over which marginal costs are taken: rows, a multiple of every tile, and context.
_STEP_ROWS = 256
_STEP_CONTEXT = 65_536
_MAX_WEIGHT = 1e6  # contexts then do not matter


class _Frame(NamedTuple):
    """What bounds every micro-batch.

    Attributes:
        max_rows: Decodes and prefill tokens together.
        num_groups: Micro-batches in flight, over which the decodes are spread.
    """

    max_rows: int
    num_groups: int


class BalancedPolicy:
    """Brings each micro-batch to one target time, which follows the backlog.

    ```
    rows      the fewest at which time(rows) of prefill is (1 + excess) times rows at the marginal
              cost of large micro-batches; from two tiles to token_budget
    excess    1 over the rounds that the backlog takes, of the rows that decodes leave; at most 0.6
              and at least 0.03: the longer it takes, the more does throughput count
    groups    S micro-batches in flight
    share     a group's part of the live decodes, by predicted cost: rows and the context they read
    room      tokens that the KV cache can take above the reserve
    backlog   waiting tokens, at most room
    chunk     backlog / n with the n for which n * (time - time of the decodes' rows and reads)
              + (S - 1) * time is least, or the smallest n with 1.05 times that, where
              time = time(share + backlog / n): n micro-batches have then brought the backlog
              through the pipeline, and decodes are no cost to it; at most room / 12S, and what the
              share leaves of the rows
    target    time(share + chunk), a bounded change from the micro-batch before, and at most
              tbt_target_s / groups
    prefill   as many tokens as bring the decodes that are ready to the target; at least
              min_prefill_tokens, which prompts under way can use however full the KV cache is
    ```

    A backlog of 8 rounds or more is deep: excess is then at most 0.06, and groups is max_in_flight,
    S + 1 if nothing else is configured. Rows exceed the mean of the micro-batches in flight by at
    most half of those at an excess of 0.6, which they may always reach.

    A batch, which is a backlog that nobody has added to for 8 rounds, should not end with a few
    long outputs alone. Those that are expected to take more rounds than all that waits go first.
    That takes 1.4 times the rounds of its prefill, or those in which it fills the KV cache,
    whichever are more. `overtaking: 0` keeps the order here, too.

    Where stages share processors, each micro-batch reads all weights and slows the others. Excess
    is then at most 0.2, and few decodes go together: one micro-batch holds them all, and those that
    are ready wait for those in flight, if time(decodes) <= crowding * time(share) + 1 ms and the
    backlog is not deep.

    It also holds before the cost model is calibrated; time is then a token count, and rows are 512.
    """

    def __init__(self, config: BalancedConfig) -> None:
        self._config = config
        self._reserve = AdaptiveReserve()
        self._is_deep = False
        self._batch_id = -1
        self._num_arrivals = self._arrival_batch_id = 0
        # Targets of this micro-batch and the one before, over the time of one full of prefill.
        self._level = self._level_before = 0.0

    @property
    def max_prefill_tokens(self) -> int:
        """The token budget: all of it, where no decode is ready."""
        return self._config.token_budget

    @property
    def num_ahead(self) -> int:
        """One, while the backlog is deep."""
        return 1

    @property
    def overtaking(self) -> float:
        """As configured."""
        return self._config.overtaking

    def budget(self, view: LoadView) -> TokenBudget:
        """Fill up to the target, after a cost-balanced share of the decodes."""
        config, frame = self._config, self._frame(view)
        if view.num_in_flight >= frame.num_groups:
            return TokenBudget(prefill_tokens=0, decodes=0)
        num_ready, num_groups = view.num_ready, frame.num_groups
        go_together = self._go_together(view, num_groups)
        if go_together:
            num_groups = 1
            num_ready = num_ready if num_ready == view.num_decoding else 0  # till all are back
        reserved_blocks = self._reserve.blocks(view)
        weight = _decode_weight(view)
        decodes = _decodes(view, min(num_ready, view.num_decoding / num_groups))
        target = self._target_time(view, frame, reserved_blocks)
        max_chunk = max(frame.max_rows - decodes.num_decodes, config.min_prefill_tokens)
        prefill_tokens = max(
            config.min_prefill_tokens,
            most_prefill_tokens(view.cost, decodes, view.prefill_start, target, max_chunk),
        )
        total = decodes.num_decodes + prefill_tokens
        is_within = total <= frame.max_rows
        return TokenBudget(
            # Shared, so that the total is exact whichever decodes it turns out to be.
            prefill_tokens=total if is_within else config.min_prefill_tokens,
            is_shared=is_within,
            decodes=num_ready,
            reserved_blocks=reserved_blocks,
            decode_load=None if go_together else _decode_load(view, weight, num_groups),
            decode_weight=weight,
            long_output=self._long_output(view, frame),
        )

    def _go_together(self, view: LoadView, num_groups: int) -> bool:
        """Whether all decodes in one micro-batch are sooner back than in several."""
        if self._is_deep or view.crowding == 1 or not view.cost.is_calibrated:
            return False
        share_time = view.cost.stage_time(_decodes(view, view.num_decoding / num_groups))
        time = view.cost.stage_time(_decodes(view, view.num_decoding))
        return time <= view.crowding * share_time + _STEP_OVERHEAD_S

    def _long_output(self, view: LoadView, frame: _Frame) -> float:
        """Outputs that would take longer than the backlog, if it is all there will be."""
        if view.num_arrivals != self._num_arrivals:
            self._num_arrivals, self._arrival_batch_id = view.num_arrivals, view.batch_id
        num_quiet_rounds = (view.batch_id - self._arrival_batch_id) / view.num_stages
        if num_quiet_rounds < _DEEP_ROUNDS or not self._config.overtaking:
            return inf
        prefill_rounds = view.num_waiting_tokens / (frame.max_rows * frame.num_groups)
        kv_rounds = view.num_waiting_token_steps / (view.num_blocks * view.block_size)
        return _BACKLOG_ROUNDS * max(prefill_rounds, kv_rounds)

    def _frame(self, view: LoadView) -> _Frame:
        """Small micro-batches for latency, larger ones for throughput as the backlog grows.

        One micro-batch more than stages waits at the first stage, so that the time from a result to
        the next micro-batch is no bubble. The decodes wait for it, too: it takes a backlog to pay.
        """
        most = _MAX_EXCESS if view.crowding == 1 else _MAX_CROWDED_EXCESS
        least_rows = self._efficient_rows(view.cost, most)
        share = view.num_decoding / view.num_stages
        prefill_rows = max(least_rows - share, least_rows * _MIN_PREFILL_SHARE)
        num_rounds = view.num_waiting_tokens / (prefill_rows * view.num_stages)
        self._is_deep = num_rounds > (_DEEP_ROUNDS / 2 if self._is_deep else _DEEP_ROUNDS)
        most = _MAX_DEEP_EXCESS if self._is_deep else most
        excess = max(_MIN_EXCESS, min(most, 1 / max(1.0, num_rounds)))
        rows = self._efficient_rows(view.cost, excess)
        # Where the KV cache holds micro-batches down, larger ones would only be fewer.
        tile = view.cost.tile
        step = max(tile, least_rows // 2 // tile * tile)
        mean_rows = view.num_tokens_in_flight / max(1, view.num_in_flight)
        next_rows = max(least_rows, int(mean_rows / step + _NEARLY) * step)
        num_groups = view.max_in_flight
        return _Frame(
            max_rows=min(rows, next_rows),
            num_groups=num_groups if self._is_deep else min(view.num_stages, num_groups),
        )

    def _efficient_rows(self, cost: CostModel, excess: float) -> int:
        """The rows from which on larger micro-batches would hardly be cheaper for each."""
        most, tile = self._config.token_budget, cost.tile
        if not cost.is_calibrated:
            return min(most, _UNCALIBRATED_ROWS)

        def time(rows: int) -> float:
            return cost.stage_time(StepLoad(num_prefill_tokens=rows))

        limit = (1 + excess) * (time(2 * most) - time(most)) / most
        tiles = range(2, max(2, most // tile))
        num_tiles = 2 + bisect_left(tiles, -limit, key=lambda n: -time(n * tile) / (n * tile))
        return min(most, num_tiles * tile)

    def _target_time(self, view: LoadView, frame: _Frame, reserved_blocks: int) -> float:
        free_blocks = view.kv_free_ratio * view.num_blocks - reserved_blocks
        room = max(0.0, free_blocks * view.block_size)
        target = self._bounded(view, self._wanted_time(view, frame, room))
        if self._config.tbt_target_s is not None and view.cost.is_calibrated:
            target = min(target, self._config.tbt_target_s / frame.num_groups)
        return target

    def _wanted_time(self, view: LoadView, frame: _Frame, room: float) -> float:
        """The time of micro-batches that bring the backlog through the pipeline soonest."""
        cost, num_stages = view.cost, view.num_stages
        share = _decodes(view, view.num_decoding / frame.num_groups)
        backlog = min(view.num_waiting_tokens, room)

        def time(chunk: int) -> float:
            chunk = max(chunk, self._config.min_prefill_tokens)
            chunk += -(share.num_decodes + chunk) % cost.tile  # which costs next to nothing
            return cost.stage_time(with_chunk(share, view.prefill_start, chunk))

        def drain_time(chunk: int) -> float:
            num_batches = ceil(backlog / chunk)
            batch_time = time(ceil(backlog / num_batches))
            return num_batches * (batch_time - decode_time) + (num_stages - 1) * batch_time

        decode_time = _decode_time(view, share)
        if not backlog:
            return time(0)
        full = max(1, frame.max_rows - share.num_decodes)
        most = min(full, ceil(room / (_KV_ROUNDS * num_stages)))
        step = max(cost.tile, ceil(full / _NUM_SIZES))
        times = {chunk: drain_time(chunk) for chunk in (*range(step, most, step), most)}
        latest = _NEARLY_SOONEST * min(times.values())
        chunk = max(chunk for chunk, drain in times.items() if drain <= latest)
        return time(ceil(backlog / ceil(backlog / chunk)))

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


def _decodes(view: LoadView, number: float) -> StepLoad:
    """The load of `number` decodes of average context."""
    context = view.num_context_tokens * number / max(1, view.num_decoding)
    return StepLoad(ceil(number), round(context))


def _decode_time(view: LoadView, share: StepLoad) -> float:
    """What the rows and reads of decodes add to a micro-batch, tiles aside."""
    more = StepLoad(share.num_decodes + _STEP_ROWS, share.num_context_tokens)
    rows_time = view.cost.stage_time(more) - view.cost.stage_time(share)
    reads = StepLoad(num_context_tokens=share.num_context_tokens)
    reads_time = view.cost.stage_time(reads) - view.cost.stage_time(StepLoad())
    return rows_time * share.num_decodes / _STEP_ROWS + reads_time


def _decode_weight(view: LoadView) -> float:
    """What a row costs, in context tokens read."""
    share = _decodes(view, view.num_decoding / view.num_stages)
    time = view.cost.stage_time(share)
    more_rows = StepLoad(share.num_decodes + _STEP_ROWS, share.num_context_tokens)
    more_context = StepLoad(share.num_decodes, share.num_context_tokens + _STEP_CONTEXT)
    row_time = (view.cost.stage_time(more_rows) - time) / _STEP_ROWS
    context_time = (view.cost.stage_time(more_context) - time) / _STEP_CONTEXT
    return min(row_time / context_time, _MAX_WEIGHT) if context_time > 0 else _MAX_WEIGHT


def _decode_load(view: LoadView, weight: float, num_groups: int) -> float:
    """A group of all decodes; one decode more or less, so that a round takes them all."""
    mean = view.num_context_tokens / max(1, view.num_decoding) + weight
    remainder = (view.batch_id % num_groups + 0.5) / num_groups
    return max(1.0, mean * (view.num_decoding / num_groups - remainder))
