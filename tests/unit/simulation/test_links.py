from collections import defaultdict
from statistics import fmean, median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.simulation.links import Link, find_link, known_links
from tests.unit.simulation.shared_data import profile_rows

num_bytes = st.integers(0, 2**30)
names = st.sampled_from(sorted(known_links()))


def make_link(**changes):
    values = {
        "name": "test",
        "is_calibrated": False,
        "provenance": "made up",
        "latency_s": 1e-5,
        "bandwidth_bytes_s": 1e9,
    }
    return Link.model_validate(values | changes)


def test_a_transfer_takes_its_latency_and_its_bytes():
    assert make_link().transfer_time_s(0) == 1e-5
    assert make_link().transfer_time_s(10**6) == pytest.approx(1.01e-3)


def test_an_all_reduce_that_was_measured_takes_what_was_measured():
    fits = [{"num_ranks": 4, "latency_s": 2e-5, "bandwidth_bytes_s": 2e9}]
    assert make_link(all_reduces=fits).all_reduce_time_s(10**6, 4) == pytest.approx(5.2e-4)


@pytest.mark.parametrize("num_ranks", [2, 3, 8])
def test_an_all_reduce_that_was_not_measured_is_a_ring(num_ranks):
    steps = 2 * (num_ranks - 1)
    expected = steps * make_link().transfer_time_s(24_000 // num_ranks)
    assert make_link().all_reduce_time_s(24_000, num_ranks) == pytest.approx(expected)


@given(names, num_bytes)
def test_one_rank_has_nothing_to_reduce(name, size):
    assert find_link(name).all_reduce_time_s(size, 1) == 0


@given(names, num_bytes, num_bytes, st.integers(2, 8))
def test_more_bytes_never_take_less_time(name, size, more, num_ranks):
    link = find_link(name)
    assert link.transfer_time_s(size) <= link.transfer_time_s(size + more)
    assert link.all_reduce_time_s(size, num_ranks) <= link.all_reduce_time_s(size + more, num_ranks)


def test_an_unknown_link_is_refused_with_those_known():
    with pytest.raises(ConfigError, match=r"link='nvlink': not known; must be one of a100-nvlink"):
        find_link("nvlink")


def measured_times(file, collective, num_ranks, devices_per_node):
    """Seconds by bytes: the median over ranks of the median over repetitions."""
    times = defaultdict(list)
    for row in profile_rows(f"network/{file}.csv"):
        if (int(row["num_workers"]), int(row["devices_per_node"])) == (num_ranks, devices_per_node):
            time_ms = float(row[f"time_stats.{collective}.median"])
            times[int(row["size"])].append(time_ms / 1000)
    return {size: median(values) for size, values in times.items()}


TRANSFERS = [
    ("a100-nvlink-pairs", "a100_pairwise_nvlink", 2, 0.07),
    ("a100-nvswitch", "a100_dgx", 2, 0.10),
    ("h100-nvswitch", "h100_dgx", 2, 0.03),
    ("a40-pcie", "a40_pairwise_nvlink", 2, 0.03),
    ("a100-dgx-inter-node", "a100_dgx", 1, 0.02),
    ("h100-dgx-inter-node", "h100_dgx", 1, 0.05),
    ("a40-inter-node", "a40_pairwise_nvlink", 1, 0.14),
]


@pytest.mark.parametrize(("name", "folder", "devices_per_node", "limit"), TRANSFERS)
def test_transfers_are_within_the_stated_error_of_the_profile(
    name, folder, devices_per_node, limit
):
    times = measured_times(f"{folder}/send_recv", "send_recv", 2, devices_per_node)
    link = find_link(name)
    assert fmean(abs(link.transfer_time_s(n) / t - 1) for n, t in times.items()) < limit


def test_large_transfers_over_100_gigabit_ethernet_are_within_the_stated_error():
    times = measured_times("a100_pairwise_nvlink/send_recv", "send_recv", 2, 1)
    large = {n: t for n, t in times.items() if n > 2_000_000}
    link = find_link("100gbe-nc96")
    assert fmean(abs(link.transfer_time_s(n) / t - 1) for n, t in large.items()) < 0.26


ALL_REDUCES = [
    ("a100-nvlink-pairs", "a100_pairwise_nvlink/all_reduce", (2, 4), 0.06),
    ("a100-nvswitch", "a100_dgx/all_reduce", (2, 4, 8), 0.14),
    ("h100-nvlink-pairs", "h100_pairwise_nvlink/all_reduce", (2, 4), 0.07),
    ("h100-nvswitch", "h100_dgx/all_reduce", (2, 4, 8), 0.12),
    ("a40-pcie", "a40_pairwise_nvlink/all_reduce_old_branch", (2, 4, 8), 0.07),
]


@pytest.mark.parametrize(("name", "file", "ranks", "limit"), ALL_REDUCES)
def test_all_reduces_are_within_the_stated_error_of_the_profile(name, file, ranks, limit):
    link = find_link(name)
    for num_ranks in ranks:
        times = measured_times(file, "all_reduce", num_ranks, num_ranks)
        errors = [abs(link.all_reduce_time_s(n, num_ranks) / t - 1) for n, t in times.items()]
        assert fmean(errors) < limit, num_ranks
