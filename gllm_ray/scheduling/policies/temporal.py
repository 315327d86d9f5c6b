"""TD-Pipe's temporal disaggregation: long phases of prefill alone and of decode alone."""

from itertools import accumulate, islice
from math import ceil

from gllm_ray.policy_config import TemporalConfig
from gllm_ray.scheduling.kv_forecast import KvForecast
from gllm_ray.scheduling.load import LoadView, StepLoad
from gllm_ray.scheduling.policies.base import TokenBudget, head_fits

# The forecast of the live sequences holds until their number has changed by more than one in so
# many; until then newcomers count as much as the others do on average.
_FORECAST_SHARE = 32
# Of the waiting sequences, no more than these are looked at in one test. More of them would only
# make the next prefill phase longer, and so a smaller share of it idle.
_MAX_REFILL = 1024
# Of more live sequences than twice this, a forecast looks at every second, third, ...
_MIN_SAMPLE = 1024
_MIN_TIME = 1e-9  # no stage is faster; it keeps the ratios finite


class TemporalPolicy:
    """Fills the KV cache with prompts, then decodes until filling it again pays.

    ```
    prefill phase  prefill_tokens, no decode; ends where no prompt waits or fits, or where
                   peak KV of the live >= kv_limit * blocks
    decode phase   no prefill, 1/S of the load of the n live; ends where
                   min_finished_ratio of them have ended and spatial < temporal, or none lives
    spatial        rate(n/S) / rate(saturating_decodes)     rate(b) = max of x / t(x), x <= b
    temporal       1 - (S-1) * max(0, tp - td) / P          P = tp * (m + S - 1)
    ```

    `t` is the time of a stage. `temporal` is for the prefill phase that the waiting sequences would
    make, up to the same `kv_limit`: `m` micro-batches of `tp` each, and then decodes of `td`; the
    S - 1 are the filling of the pipeline.

    A prompt partly prefilled is finished before the phase ends. A decode phase begins with its
    first micro-batch: until then, prompts that come are prefilled while the last ones are in
    flight. Beyond that, whether it ends is asked once in S micro-batches.

    Source: "TD-Pipe: Temporally-Disaggregated Pipeline Parallelism Architecture for
        High-Throughput LLM Inference", ICPP '25 (arXiv:2506.10470), and its code at c8c5316.
        Deviations from that code:
        prompts are chunked, so that the micro-batches of a prefill phase cost the same;
        both tests use one `kv_limit`, so that a phase does not end as soon as it began, and a
        decode phase has a least length;
        all times are a stage's, where the code compares a stage's prefill with the whole model's
        decode, and decodes also read their context; idle time is never negative;
        the rate is an envelope, because times rise in steps, and saturates at one size, not two;
        a decode micro-batch is a share of the load of the live, not of their number, where one
        decode weighs its context and what it adds to the time of others;
        decodes come in turn, where the code sorts them by arrival: none starves, nothing is sorted;
        a micro-batch may hold a single decode, and takes no last few along, so that as many
        micro-batches are in flight as there are stages;
        the scheduler, not the phase, bounds their number.
    """

    def __init__(self, config: TemporalConfig) -> None:
        self._config = config
        self._is_decode_phase = False
        self._phase_batch_id = 0  # the first micro-batch of the decode phase
        self._test_batch_id = 0  # the next one when it was last asked whether the phase ends
        self._num_started = 0  # most sequences that lived in the phase at once
        self._num_preemptions = 0  # before the phase
        self._rates: tuple[float, ...] = ()  # rate(1), rate(2), ... as the cost is in the phase
        self._num_forecast = 0  # sequences in the latest forecast of the live
        self._forecast_blocks = 0  # their peak

    @property
    def max_prefill_tokens(self) -> int:
        """Most prompt tokens that `budget` ever allows."""
        return self._config.prefill_tokens

    def budget(self, view: LoadView) -> TokenBudget:
        """Go on with the phase, or change it first."""
        if self._goes_on_decoding(view):
            return self._decode_budget(view)
        has_room = head_fits(view, self._watermark(view)) and not self._is_filled(view)
        if has_room or view.num_prefilling:
            self._is_decode_phase = False
            return TokenBudget(
                prefill_tokens=self._config.prefill_tokens,
                decodes=0,
                reserved_blocks=self._watermark(view) if has_room else view.num_blocks,
            )
        if not self._is_decode_phase:
            self._is_decode_phase = True
            self._phase_batch_id = self._test_batch_id = view.batch_id
            self._num_started = 0
            self._num_preemptions = view.num_preemptions
            self._rates = ()
        return self._decode_budget(view)

    def _goes_on_decoding(self, view: LoadView) -> bool:
        """Whether a decode phase has begun and does not end here."""
        has_begun = self._is_decode_phase and view.batch_id > self._phase_batch_id
        is_any_live = view.num_decoding + view.num_prefills_in_flight > 0
        if not has_begun or not is_any_live or view.num_prefilling:
            return False
        if view.batch_id - self._test_batch_id < view.num_stages:
            return True
        self._test_batch_id = view.batch_id
        return not self._refill_pays(view)

    def _decode_budget(self, view: LoadView) -> TokenBudget:
        """Decodes that are 1/S of the load of all live ones, half a decode more or less.

        Of a remainder of n / S decodes, the first micro-batches of each S take one more.
        """
        num_live, num_context_tokens = _live(view)
        self._num_started = max(self._num_started, num_live)
        share, remainder = divmod(num_live, view.num_stages)
        turn = (view.batch_id - self._phase_batch_id) % view.num_stages
        decodes = max(1, share + (turn < remainder))
        weight = self._decode_weight(view, share, num_context_tokens // view.num_stages)
        if weight is None:
            return TokenBudget(prefill_tokens=0, decodes=decodes)
        mean_load = num_context_tokens / num_live + weight
        return TokenBudget(
            prefill_tokens=0,
            decodes=view.num_ready,
            decode_load=(decodes - 0.5) * mean_load,
            decode_weight=weight,
        )

    def _decode_weight(
        self, view: LoadView, num_decodes: int, num_context_tokens: int
    ) -> float | None:
        """What one more decode costs beside reading its context, in context tokens.

        None where there is nothing to balance: the cost model knows no price of a context, or the
        micro-batches hold one or two decodes each, which would leave stages idle if they shared.
        """
        if num_decodes < 2:
            return None
        compute = self._time(view, StepLoad(num_decodes))
        reading = self._time(view, StepLoad(num_decodes, num_context_tokens)) - compute
        if reading <= 0:
            return None
        rise = (compute - self._time(view, StepLoad(1))) / (num_decodes - 1)
        return max(0.0, rise) * num_context_tokens / reading

    def _watermark(self, view: LoadView) -> int:
        return ceil(self._config.watermark * view.num_blocks)

    def _is_filled(self, view: LoadView) -> bool:
        """Whether the live sequences are expected to need the limit at their peak."""
        limit = self._config.kv_limit * view.num_blocks
        num_live = view.num_live
        tolerance = self._num_forecast // _FORECAST_SHARE
        is_near = tolerance > 0 and abs(num_live - self._num_forecast) <= tolerance
        if is_near and num_live * self._forecast_blocks < limit * self._num_forecast:
            return False
        if not is_near or num_live != self._num_forecast:
            self._forecast(view)
        return self._forecast_blocks >= limit

    def _forecast(self, view: LoadView) -> tuple[KvForecast, int]:
        """The forecast of every n-th live sequence, and n."""
        stride = max(1, view.num_live // _MIN_SAMPLE)
        forecast = KvForecast(view.block_size)
        for sequence in islice(view.live, 0, None, stride):
            forecast.add(sequence)
        forecast.set_used_blocks((view.num_blocks - view.num_free_blocks) // stride)
        self._num_forecast = view.num_live
        self._forecast_blocks = stride * forecast.peak_blocks()
        return forecast, stride

    def _refill_pays(self, view: LoadView) -> bool:
        """Whether decodes have become so few that a prefill phase idles the pipeline less."""
        num_live, num_context_tokens = _live(view)
        num_preempted = view.num_preemptions - self._num_preemptions
        num_ended = self._num_started - num_live - num_preempted
        if num_ended < self._config.min_finished_ratio * self._num_started:
            return False
        spatial = self._spatial_intensity(view, num_live)
        if spatial >= 1 or not head_fits(view, self._watermark(view)):
            return False
        forecast, stride = self._forecast(view)
        limit = self._config.kv_limit * view.num_blocks / stride
        lengths: list[int] = []
        for sequence in islice(view.waiting, _MAX_REFILL):
            if forecast.reaches(limit):
                break
            if len(lengths) % stride == 0:
                forecast.add(sequence)
            lengths.append(sequence.num_tokens)
        return bool(lengths) and spatial < self._temporal_intensity(
            view, lengths, num_live + len(lengths), num_context_tokens + sum(lengths)
        )

    def _spatial_intensity(self, view: LoadView, num_live: int) -> float:
        """Token rate of the decodes left, as a share of that of a saturating micro-batch."""
        sizes = range(1, self._config.saturating_decodes + 1)
        if not self._rates:
            rates = (size / self._time(view, StepLoad(num_decodes=size)) for size in sizes)
            self._rates = tuple(accumulate(rates, max))
        share = num_live // view.num_stages
        return self._rates[min(max(1, share), len(sizes)) - 1] / self._rates[-1]

    def _temporal_intensity(
        self, view: LoadView, lengths: list[int], num_live: int, num_context_tokens: int
    ) -> float:
        """Share of a prefill phase of prompts of these lengths that is no bubble, 1/S to 1."""
        num_stages, chunk = view.num_stages, self._config.prefill_tokens
        num_batches = max(1, sum(lengths) / chunk)
        # The chunks of a prompt attend to 1, 2, ... chunks.
        num_pairs = sum(length * (length + min(length, chunk)) // 2 for length in lengths)
        prefill = StepLoad(
            num_prefill_tokens=min(chunk, sum(lengths)),
            num_attention_pairs=round(num_pairs / num_batches),
        )
        decode = StepLoad(max(1, num_live // num_stages), num_context_tokens // num_stages)
        prefill_time, decode_time = self._time(view, prefill), self._time(view, decode)
        idle = (num_stages - 1) * max(0, prefill_time - decode_time)
        return 1 - idle / (prefill_time * (num_batches + num_stages - 1))

    def _time(self, view: LoadView, load: StepLoad) -> float:
        """The time of a stage, or, before any is known, as if all its small batches cost alike."""
        if view.cost.is_calibrated:
            return max(_MIN_TIME, view.cost.stage_time(load))
        return float(max(load.num_tokens, self._config.saturating_decodes))


def _live(view: LoadView) -> tuple[int, int]:
    """Number and context of the sequences that decode, or will once their prefill returns."""
    if not view.num_prefills_in_flight:
        return view.num_decoding, view.num_context_tokens
    lengths = [sequence.num_tokens for sequence in view.live]
    return len(lengths), sum(lengths)
