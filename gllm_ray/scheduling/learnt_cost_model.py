"""Predicted stage times from coefficients that are learnt while serving."""

from collections.abc import Sequence
from math import inf

from gllm_ray.scheduling.cost_model import LinearCostModel, priced_rows
from gllm_ray.scheduling.load import StepLoad

# One row costs 1. A context token costs a thousandth of it and an attention pair a thirty
# thousandth, which is within a factor of 5 for dense models of 13 to 70 billion parameters on L20
# and A100.
_TOKEN_COUNTS = LinearCostModel(
    floor_s=0.0,
    token_s=1.0,
    context_token_s=1e-3,
    attention_pair_s=1 / 30_000,
    tile=1,
)
_TILES = (128, 1, 64, 256)  # the first is in use until another proves better
_FORGETTING = 0.998  # a memory of 500 micro-batches along each direction of the load
_ERROR_RATE = 0.01
_MAX_ERROR = 0.2  # to become calibrated
_LOST_ERROR = 0.4  # to stay so
_BETTER = 0.9  # a tile gives way to one that mispredicts less than this share of what it does
_MIN_ROUNDS = 50  # samples after which a tile may give way
_AGREEMENT = 0.05  # of two predictions so near each other, a sample does not tell which is right
_SPREAD = 2  # the most rows seen, over the fewest


class LearntCostModel:
    """Learns the coefficients of `LinearCostModel` online, and which tile fits best.

    There is one regression for each candidate tile: the one in use learns from each sample, the
    others take turns, and one that is clearly better takes its place. Predictions are token counts
    until the running error is small and micro-batches of different sizes were seen.
    """

    def __init__(self) -> None:
        self._fits = [_Regression(tile) for tile in _TILES]
        self._fit = self._fits[0]
        self._turn = 0
        self._coefficients = _TOKEN_COUNTS
        self._min_tokens, self._max_tokens = inf, 0

    @property
    def is_calibrated(self) -> bool:
        """Whether predictions are seconds; until then one row's time is 1."""
        return self._coefficients is not _TOKEN_COUNTS

    @property
    def calibration(self) -> LinearCostModel | None:
        """What is learnt so far; None until it is calibrated."""
        return self._coefficients if self.is_calibrated else None

    @property
    def tile(self) -> int:
        """Rows that cost as much as the next multiple of this."""
        return self._coefficients.tile

    def stage_time(self, load: StepLoad) -> float:
        """The time of the slowest stage, in seconds or in units of one row's time."""
        return self._coefficients.stage_time(load)

    def observe(self, load: StepLoad, time_s: float) -> None:
        """Learn from the measured time of the slowest stage; an impossible one is left out."""
        if load.num_tokens == 0 or not 0 < time_s < inf:
            return
        self._min_tokens = min(self._min_tokens, load.num_tokens)
        self._max_tokens = max(self._max_tokens, load.num_tokens)
        predicted = self._fit.predict(load)
        missed_tokens = self._fit.observe(load, time_s)
        self._challenge(load, time_s, predicted, missed_tokens)
        limit = _LOST_ERROR if self.is_calibrated else _MAX_ERROR
        is_spread = self._max_tokens >= _SPREAD * self._min_tokens
        is_calibrated = is_spread and self._fit.error < limit and self._fit.weights[1] > 0
        self._coefficients = self._fit.coefficients() if is_calibrated else _TOKEN_COUNTS

    def _challenge(
        self, load: StepLoad, time_s: float, predicted: float, missed_tokens: float
    ) -> None:
        """Let a rival learn too, and take over if on the samples it saw it was clearly better."""
        # A linear congruential generator: micro-batches repeat with the number of stages, and a
        # round of turns would show each rival but a part of them.
        self._turn = (1_103_515_245 * self._turn + 12_345) % 2**31
        rivals = [fit for fit in self._fits if fit is not self._fit]
        rival = rivals[(self._turn >> 16) % len(rivals)]
        ratio = rival.predict(load) / (predicted or 1.0)
        rival_missed_tokens = rival.observe(load, time_s)
        if not 1 - _AGREEMENT < ratio < 1 + _AGREEMENT:
            rival.compare(missed_tokens, rival_missed_tokens)
        if rival.num_rounds >= _MIN_ROUNDS and rival.missed < _BETTER * rival.missed_by_used:
            self._fit = rival
            for fit in self._fits:
                fit.num_rounds = 0


class _Regression:
    """Recursive least squares of the relative error, for one tile; weights are never negative.

    A sample and its prediction are divided by the larger of the two. So a sample a hundred times
    too slow weighs a ten thousandth, and neither warm-up nor a busy machine does harm.

    The information matrix R and the moment b, whose solution is R w = b, forget only along the new
    sample: what constant load does not excite is neither forgotten nor wound up. One sweep of
    coordinate descent a sample leads w to the best weights that are not negative.

    Source: Cao and Schwartz, "A directional forgetting algorithm based on the decomposition of the
        information matrix", Automatica 36 (2000). Deviations: relative error; b is kept, and
        coordinate descent under w >= 0 takes the place of the inverse of R.

    Attributes:
        weights: Of 1, rows, context tokens and attention pairs.
        error: Running mean of the relative error, 0 to 1.
        num_rounds: Samples on which it disagreed with the one in use.
        missed: Running mean of the tokens it mispredicted on those. Tokens, because micro-batches
            of few rows say little of tiles.
        missed_by_used: That of the one in use.
    """

    __slots__ = (
        "_information",
        "_moment",
        "error",
        "missed",
        "missed_by_used",
        "num_rounds",
        "tile",
        "weights",
    )

    def __init__(self, tile: int) -> None:
        self.tile = tile
        self.weights = [0.0] * 4
        self.error = 1.0
        self.num_rounds = 0
        self.missed = self.missed_by_used = 0.0
        self._information = [[0.0] * 4 for _ in range(4)]
        self._moment = [0.0] * 4

    def coefficients(self) -> LinearCostModel:
        floor_s, token_s, context_token_s, attention_pair_s = self.weights
        return LinearCostModel(
            floor_s=floor_s,
            token_s=token_s,
            context_token_s=context_token_s,
            attention_pair_s=attention_pair_s,
            tile=self.tile,
        )

    def observe(self, load: StepLoad, time_s: float) -> float:
        """Learn from a sample; returns how many of its tokens were mispredicted."""
        features = self._features(load)
        predicted = _dot(features, self.weights)
        scale = max(time_s, predicted)
        error = abs(time_s - predicted) / scale
        self.error += _ERROR_RATE * (error - self.error)
        self._add([feature / scale for feature in features], time_s / scale)
        self._descend()
        return error * load.num_tokens

    def predict(self, load: StepLoad) -> float:
        """The time of a micro-batch, as far as it is known."""
        return _dot(self._features(load), self.weights)

    def _features(self, load: StepLoad) -> tuple[int, int, int, int]:
        rows = priced_rows(load.num_tokens, self.tile)
        return (1, rows, load.num_context_tokens, load.num_attention_pairs)

    def compare(self, missed_by_used: float, missed: float) -> None:
        """Note how many tokens of a sample the one in use and this one mispredicted."""
        self.num_rounds += 1
        rate = max(_ERROR_RATE, 1 / self.num_rounds)
        self.missed_by_used += rate * (missed_by_used - self.missed_by_used)
        self.missed += rate * (missed - self.missed)

    def _add(self, x: list[float], y: float) -> None:
        """R += x x' and b += x y, after both have forgotten along x."""
        information, moment = self._information, self._moment
        u = [_dot(row, x) for row in information]
        known = _dot(x, u)
        # Below this share of what its parts alone are known for, x is new and `known` is rounding.
        is_new = known <= 1e-9 * sum(information[i][i] * x[i] * x[i] for i in range(4))
        rate = 0.0 if is_new else (1 - _FORGETTING) / known
        expected = rate * _dot(x, moment)
        for i, row in enumerate(information):
            added, forgotten = x[i], rate * u[i]
            row[0] += added * x[0] - forgotten * u[0]
            row[1] += added * x[1] - forgotten * u[1]
            row[2] += added * x[2] - forgotten * u[2]
            row[3] += added * x[3] - forgotten * u[3]
            moment[i] += added * y - expected * u[i]

    def _descend(self) -> None:
        """Minimise over one weight after the other."""
        weights = self.weights
        for i, row in enumerate(self._information):
            if row[i] > 0:
                weights[i] = max(0.0, weights[i] + (self._moment[i] - _dot(row, weights)) / row[i])


def _dot(a: Sequence[float], b: Sequence[float]) -> float:
    return a[0] * b[0] + a[1] * b[1] + a[2] * b[2] + a[3] * b[3]
