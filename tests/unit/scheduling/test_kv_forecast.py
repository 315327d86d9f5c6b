from collections import Counter
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.scheduling.kv_forecast import KvForecast
from tests.unit.scheduling.views import Length


def forecast(lengths, block_size=16):
    result = KvForecast(block_size)
    for length in lengths:
        result.add(Length(*length))
    return result


def exact_peak(lengths, block_size):
    """Step by step: a sequence holds its blocks up to its last expected token."""
    return max(
        sum(ceil((held + step) / block_size) for held, expected in lengths if expected >= step)
        for step in range(1, max(expected for _, expected in lengths) + 1)
    )


LENGTHS = st.lists(st.tuples(st.integers(1, 600), st.integers(1, 400)), min_size=1, max_size=12)


@pytest.mark.parametrize(("expected", "num_blocks"), [(300, 25), (511, 39), (1, 7), (28, 8)])
def test_the_peak_of_one_sequence_is_what_it_holds_at_its_end(expected, num_blocks):
    assert forecast([(100, expected)]).peak_blocks() == num_blocks


@given(st.integers(1, 10**6), st.integers(1, 10**6), st.integers(1, 64))
def test_the_peak_of_one_sequence_is_exact(held, expected, block_size):
    peak = forecast([(held, expected)], block_size).peak_blocks()
    assert peak == ceil((held + expected) / block_size)


@given(LENGTHS, st.sampled_from([1, 4, 16]))
def test_the_peak_is_never_below_the_exact_one_and_little_above(lengths, block_size):
    peak, exact = forecast(lengths, block_size).peak_blocks(), exact_peak(lengths, block_size)
    assert exact <= peak <= exact + max(exact / 8, len(lengths))


def test_what_ends_early_makes_room_for_what_goes_on():
    # 10 sequences hold 16 blocks each at step 16; some of them go on, up to 32 blocks.
    assert forecast([(240, 16)] * 8 + [(240, 272)] * 2).peak_blocks() == 10 * 16
    assert forecast([(240, 16)] * 2 + [(240, 272)] * 8).peak_blocks() == 8 * 32


@given(LENGTHS, st.randoms(use_true_random=False))
def test_the_order_of_the_sequences_does_not_matter(lengths, random):
    shuffled = random.sample(lengths, len(lengths))
    assert Counter(shuffled) == Counter(lengths)
    assert forecast(shuffled).peak_blocks() == forecast(lengths).peak_blocks()


@given(LENGTHS, st.integers(1, 2000))
def test_reaching_a_limit_is_asked_at_any_time_and_means_the_peak(lengths, limit):
    growing = KvForecast(16)
    for index, length in enumerate(lengths, start=1):
        growing.add(Length(*length))
        assert growing.reaches(limit) == (forecast(lengths[:index]).peak_blocks() >= limit)


def test_blocks_of_a_common_prefix_count_once():
    shared = forecast([(1600, 160)] * 10)  # 100 blocks each, of which 91 are common
    assert shared.peak_blocks() == 1100
    shared.set_used_blocks(91 + 10 * 9)
    assert shared.peak_blocks() == 91 + 10 * 19


@given(LENGTHS, st.integers(0, 10**5))
def test_more_used_blocks_than_the_sequences_hold_change_nothing(lengths, others):
    held = sum(ceil(held / 16) for held, _ in lengths)
    told = forecast(lengths)
    told.set_used_blocks(held + others)
    assert told.peak_blocks() == forecast(lengths).peak_blocks()


def test_no_sequence_needs_nothing():
    empty = KvForecast(16)
    empty.set_used_blocks(0)
    assert empty.peak_blocks() == 0
    assert not empty.reaches(1)
