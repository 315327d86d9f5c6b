"""Stage times from measurements: a table over rows, and terms for what attention reads."""

from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import repeat
from statistics import fmean, median
from typing import Self

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation.attention_cost import (
    NO_WINDOW,
    AttentionCost,
    attention_costs,
    attention_time_s,
)
from gllm_ray.simulation.cost_fit import least_squares
from gllm_ray.simulation.devices import Device
from gllm_ray.simulation.pipeline_layout import PipelineLayout
from gllm_ray.simulation.stage_profile import StageProfile

Point = tuple[int, float]


class MonotoneTable:
    """A function of rows that never falls: linear between points, proportional beyond the last.

    Points out of order, as noise makes them, give way to their mean: isotonic regression by
    pooling adjacent violators.
    """

    def __init__(self, points: Iterable[Point]) -> None:
        """Take points of rows and seconds, at least one, of which rows occur once each."""
        self._rows: list[int] = []
        pools: list[tuple[float, int]] = []
        for rows, time_s in sorted(points):
            self._rows.append(rows)
            total, count = max(time_s, 0.0), 1
            while pools and pools[-1][0] * count > total * pools[-1][1]:
                before = pools.pop()
                total, count = total + before[0], count + before[1]
            pools.append((total, count))
        self._times_s = [
            time_s for total, count in pools for time_s in repeat(total / count, count)
        ]
        self._known: dict[int, float] = {}

    def time_s(self, num_rows: int) -> float:
        """The value at `num_rows`."""
        time_s = self._known.get(num_rows)
        if time_s is None:
            time_s = self._known[num_rows] = self._interpolate(num_rows)
        return time_s

    def _interpolate(self, num_rows: int) -> float:
        rows, times_s = self._rows, self._times_s
        if num_rows >= rows[-1]:
            return times_s[-1] * num_rows / rows[-1]
        upper = bisect_left(rows, num_rows)
        if upper == 0:
            return times_s[0]
        share = (num_rows - rows[upper - 1]) / (rows[upper] - rows[upper - 1])
        return times_s[upper - 1] + share * (times_s[upper] - times_s[upper - 1])


class MeasuredCost:
    """Predicts stage times from measurements of the same pipeline, or of the whole model."""

    def __init__(
        self,
        layout: PipelineLayout,
        tables: Sequence[MonotoneTable],
        attention: Sequence[Sequence[AttentionCost]],
    ) -> None:
        """Take for each stage its time over rows, and what attention adds to it."""
        self._layout = layout
        self._stages = list(zip(tables, attention, strict=True))

    @classmethod
    def from_prefills(
        cls,
        layout: PipelineLayout,
        points: Sequence[Point],
        device: Device,
        stage_weights: Sequence[float] | None = None,
    ) -> Self:
        """Share out the measured time of whole-model prefills, one prompt each.

        The attention of the prompt to itself is taken off, and that of the load put on, with the
        constants of the device.

        Args:
            layout: The pipeline.
            points: Tokens and seconds.
            device: What the times were measured on.
            stage_weights: What each stage has of the time, in any unit; None: the same.

        Raises:
            ConfigError: There is not one positive weight for each stage.
        """
        weights = stage_weights or [1.0] * layout.num_stages
        if len(weights) != layout.num_stages or min(weights) <= 0:
            raise ConfigError(
                f"stage_weights={list(weights)}: must be {layout.num_stages} positive numbers"
            )
        costs = [attention_costs(layout, stage, device) for stage in range(layout.num_stages)]
        tables = []
        for weight, attention in zip(weights, costs, strict=True):
            share = weight / sum(weights)
            tables.append(
                MonotoneTable(
                    (n, share * time_s - attention_time_s(attention, StepLoad(0, 0, n, n * n)))
                    for n, time_s in points
                )
            )
        return cls(layout, tables, costs)

    @classmethod
    def from_profile(cls, layout: PipelineLayout, profile: StageProfile) -> Self:
        """Fit to the stage times of a running pipeline.

        Attention is told from rows by loads of equally many rows that differ in context or pairs.

        Raises:
            ConfigError: The profile is of other stages.
        """
        if profile.layers != layout.num_layers:
            raise ConfigError(
                f"the profile is of stages of {profile.layers} layers; must be of "
                f"{layout.num_layers}, those that are simulated: give pipeline.num_stages and "
                "pipeline.layers as they were measured, or measure these"
            )
        fits = [
            _fit([(s.load, s.stage_times_s[stage]) for s in profile.samples])
            for stage in range(layout.num_stages)
        ]
        return cls(layout, [table for table, _ in fits], [[cost] for _, cost in fits])

    @property
    def layout(self) -> PipelineLayout:
        """The pipeline."""
        return self._layout

    def stage_time_s(self, stage_id: int, load: StepLoad) -> float:
        """The time of a stage; never falls when any part of the load grows."""
        table, attention = self._stages[stage_id]
        return table.time_s(load.num_tokens) + attention_time_s(attention, load)

    def attention(self, stage_id: int) -> Sequence[AttentionCost]:
        """What attention adds to the time of a stage, one entry for each window."""
        return self._stages[stage_id][1]


def _fit(samples: Sequence[tuple[StepLoad, float]]) -> tuple[MonotoneTable, AttentionCost]:
    """Tell attention from rows by samples of equal rows; what attention leaves is the table."""
    groups: defaultdict[int, list[tuple[StepLoad, float]]] = defaultdict(list)
    for load, time_s in samples:
        groups[load.num_tokens].append((load, time_s))
    features, differences, scales = [], [], []
    for group in groups.values():
        mean_context = fmean(load.num_context_tokens for load, _ in group)
        mean_pairs = fmean(load.num_attention_pairs for load, _ in group)
        mean_s = fmean(time_s for _, time_s in group)
        for load, time_s in group:
            features.append(
                (load.num_context_tokens - mean_context, load.num_attention_pairs - mean_pairs)
            )
            differences.append(time_s - mean_s)
            scales.append(mean_s)
    context_token_s, pair_s = least_squares(features, differences, scales)
    cost = AttentionCost(NO_WINDOW, context_token_s, pair_s)
    return MonotoneTable(
        (rows, median(time_s - attention_time_s([cost], load) for load, time_s in group))
        for rows, group in groups.items()
    ), cost
