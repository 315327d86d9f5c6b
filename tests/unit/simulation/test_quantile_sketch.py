"""A sketch tells exact quantiles of few values, and close ones of many, however it was filled."""

import statistics
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.simulation.quantile_sketch import QuantileSketch

ERROR = 0.005
values = st.floats(min_value=0, max_value=1e9).filter(lambda value: value == 0 or value > 1e-9)


def sketch_of(numbers, max_exact=16_384):
    sketch = QuantileSketch(max_exact)
    for number in numbers:
        sketch.add(number)
    return sketch


@given(st.lists(values, min_size=2))
def test_quantiles_of_few_values_are_those_of_the_standard_library(numbers):
    sketch = sketch_of(numbers)
    for index, expected in enumerate(statistics.quantiles(numbers, n=100, method="inclusive")):
        assert sketch.quantile((index + 1) / 100) == pytest.approx(expected, rel=1e-9, abs=1e-12)


@given(st.lists(values, min_size=1), st.integers(0, 100))
def test_a_quantile_of_many_values_is_close_to_the_value_of_its_rank(numbers, percent):
    sketch = sketch_of(numbers, max_exact=0)
    exact = sorted(numbers)[int(percent / 100 * (len(numbers) - 1))]
    assert sketch.quantile(percent / 100) == pytest.approx(exact, rel=ERROR * 1.001, abs=1e-9)


def test_the_order_of_values_does_not_matter():
    numbers = [Random(0).lognormvariate(0, 2) for _ in range(1000)]
    for max_exact in (10, 10_000):
        first, second = sketch_of(numbers, max_exact), sketch_of(sorted(numbers), max_exact)
        assert list(first.items()) == list(second.items())


def test_several_equal_values_count_as_often():
    for max_exact in (0, 100):
        sketch = sketch_of([1.0], max_exact)
        sketch.add(5.0, count=3)
        assert (sketch.count, sketch.mean) == (4, 4.0)
        assert sketch.quantile(0.5) == pytest.approx(5, rel=ERROR)


def test_memory_is_bounded_and_mean_and_extremes_stay_exact():
    rng = Random(0)
    numbers = [rng.lognormvariate(-3, 4) for _ in range(50_000)]
    sketch = sketch_of(numbers)
    assert len(list(sketch.items())) < 4200
    assert sketch.mean == pytest.approx(statistics.fmean(numbers), rel=1e-9)
    assert (sketch.quantile(0), sketch.quantile(1)) == (
        pytest.approx(min(numbers), rel=ERROR),
        pytest.approx(max(numbers), rel=ERROR),
    )
    assert (sketch.min, sketch.max) == (min(numbers), max(numbers))


def test_no_values_tell_nothing():
    sketch = QuantileSketch()
    assert (sketch.count, sketch.mean, sketch.max, sketch.quantile(0.5)) == (0, 0, 0, 0)


@pytest.mark.parametrize("value", [-1e-3, float("nan")])
def test_what_is_no_length_of_time_is_refused(value):
    with pytest.raises(ValueError, match="must be >= 0"):
        QuantileSketch().add(value)
