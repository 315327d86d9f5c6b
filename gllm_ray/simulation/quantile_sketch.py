"""Quantiles of any number of values in bounded memory."""

import math
from collections.abc import Iterator

_RELATIVE_ERROR = 0.005
_LOG_RATIO = math.log((1 + _RELATIVE_ERROR) / (1 - _RELATIVE_ERROR))
# Shorter than any latency, and fewer than any count, that is not 0.
_SMALLEST = 1e-9
_MAX_EXACT = 16_384


class QuantileSketch:
    """The mean, the extremes and the quantiles of values that are not negative.

    Up to `max_exact` values are kept, and quantiles interpolate between them, as those of
    `statistics.quantiles(method="inclusive")` do. Then all values go to buckets whose bounds grow
    by 1 %, and a quantile is within 0.5 % of the value of its rank. Count, mean and extremes stay
    exact. Sketches of the same values, in whatever order, tell the same quantiles.

    Source: Masson, Rim and Lee, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with
        Relative-Error Guarantees", PVLDB 12(12), 2019. Deviations: values are kept at first, and
        buckets are never collapsed, because the range of 1e-9 to 1e9 takes but 4,145 of them.

    Args:
        max_exact: Values kept before quantiles become approximate.

    Attributes:
        count: Values counted.
        min: The smallest; infinity of no values.
        max: The largest; 0 of no values.
    """

    def __init__(self, max_exact: int = _MAX_EXACT) -> None:
        self.count = 0
        self.max = 0.0
        self.min = math.inf
        self._total = 0.0
        self._max_exact = max_exact
        self._values: list[float] = []
        self._buckets: dict[int, int] = {}

    @property
    def mean(self) -> float:
        """The mean; 0 of no values."""
        return self._total / self.count if self.count else 0.0

    def add(self, value: float, count: int = 1) -> None:
        """Count a value, or several that are the same.

        Raises:
            ValueError: It is negative or not a number.
        """
        if not value >= 0:
            raise ValueError(f"value={value}: must be >= 0")
        self.count += count
        self._total += count * value
        if value < self.min:
            self.min = value
        if value > self.max:
            self.max = value
        if self._buckets:
            self._add_to_bucket(value, count)
        elif self.count <= self._max_exact:
            self._values += [value] * count
        else:
            for kept in self._values:
                self._add_to_bucket(kept, 1)
            self._values = []
            self._add_to_bucket(value, count)

    def items(self) -> Iterator[tuple[float, int]]:
        """The values in ascending order, or the middles of buckets, each with its count."""
        if not self._buckets:
            self._values.sort()
            yield from ((value, 1) for value in self._values)
        for bucket in sorted(self._buckets):
            middle = math.exp(bucket * _LOG_RATIO) * (1 - _RELATIVE_ERROR)
            yield min(max(middle, self.min), self.max), self._buckets[bucket]

    def quantile(self, probability: float) -> float:
        """The value that a share of the values, from 0 to 1, does not exceed; 0 of no values."""
        if not self.count:
            return 0.0
        rank = probability * (self.count - 1)
        if not self._buckets:
            self._values.sort()
            low = self._values[int(rank)]
            return low + (rank - int(rank)) * (self._values[math.ceil(rank)] - low)
        num_passed = 0
        for value, count in self.items():
            num_passed += count
            if num_passed > rank:
                return value
        return self.max

    def _add_to_bucket(self, value: float, count: int) -> None:
        bucket = math.ceil(math.log(max(value, _SMALLEST)) / _LOG_RATIO)
        self._buckets[bucket] = self._buckets.get(bucket, 0) + count
