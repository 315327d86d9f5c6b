"""Lengths have the statistics that are published of their datasets."""

import csv
from pathlib import Path
from random import Random
from statistics import fmean, pstdev, quantiles

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.simulation.length_config import LengthsConfig
from gllm_ray.simulation.lengths import DATASETS, QuantileTable, RequestLengths

TRACES = Path(__file__).parents[4] / "shared" / "data" / "traces"
NUM_DRAWS = 50_000
# Mean, median, 90th and 99th percentile, largest; None: not published.
PUBLISHED = {
    ("sharegpt", 0): (225.3, None, None, None, 1024),
    ("sharegpt", 1): (157.0, None, None, None, 512),
    ("sharegpt_8k", 0): (2340, 1730, 5696, None, 8141),
    ("sharegpt_8k", 1): (439, 415, 834, None, 1024),
    ("azure_conversation", 0): (1155, 1020, 2735, 4142, 14050),
    ("azure_conversation", 1): (211, 129, 424, 601, 1000),
    ("azure_code", 0): (2048, 1469, 5188, None, 7437),
    ("azure_code", 1): (28, 13, 55, None, 1899),
    ("arxiv_summarization", 0): (None, 7059, 12985, None, None),
    ("arxiv_summarization", 1): (None, 208, 371, None, None),
}


def draw(lengths, num_draws=NUM_DRAWS, seed=0):
    """Prompt and output lengths of requests."""
    sampler, rng = RequestLengths(LengthsConfig.model_validate(lengths)), Random(seed)
    return list(zip(*(sampler.sample(rng) for _ in range(num_draws)), strict=True))


@pytest.mark.parametrize(("dataset", "side"), PUBLISHED)
def test_a_table_has_the_published_statistics(dataset, side):
    table = DATASETS[dataset][side]
    mean, median, p90, p99, largest = PUBLISHED[dataset, side]
    if mean is not None:
        assert table.mean() == pytest.approx(mean, rel=0.03)
    for probability, tokens in ((0.5, median), (0.9, p90), (0.99, p99), (1, largest)):
        if tokens is not None:
            assert table.quantile(probability) == pytest.approx(tokens, rel=0.005)


def test_arxiv_lengths_have_the_published_deviations():
    assert [pstdev(side) for side in draw("arxiv_summarization")] == [
        pytest.approx(3638, rel=0.03),
        pytest.approx(265, rel=0.05),
    ]


@pytest.mark.parametrize("dataset", DATASETS)
def test_draws_follow_the_table(dataset):
    sides = draw({"prompt": dataset, "output": dataset})
    for drawn, table in zip(sides, DATASETS[dataset], strict=True):
        assert fmean(drawn) == pytest.approx(table.mean(), rel=0.02)
        assert quantiles(drawn, n=10)[8] == pytest.approx(table.quantile(0.9), rel=0.03, abs=1)


@pytest.mark.skipif(not TRACES.is_dir(), reason="../shared/data/traces is not there")
@pytest.mark.parametrize(
    ("file", "dataset"),
    [("sharegpt_8k.csv", "sharegpt_8k"), ("azure_conv.csv", "azure_conversation")],
)
def test_a_table_follows_its_trace(file, dataset):
    with (TRACES / file).open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    for column, table in zip(
        ("num_prefill_tokens", "num_decode_tokens"), DATASETS[dataset], strict=True
    ):
        lengths = [int(row[column]) for row in rows]
        assert table.mean() == pytest.approx(fmean(lengths), rel=0.02)
        for index, tokens in enumerate(quantiles(lengths, n=10, method="inclusive"), start=1):
            assert table.quantile(index / 10) == pytest.approx(tokens, rel=0.01), index


def test_quantiles_are_log_linear_between_the_points():
    table = QuantileTable([(0, 1), (0.5, 10), (1, 1000)])
    assert [table.quantile(p) for p in (0, 0.25, 0.5, 0.75, 1)] == pytest.approx(
        [1, 10**0.5, 10, 100, 1000]
    )


def test_the_mean_of_a_table_is_that_of_its_quantiles():
    table = QuantileTable([(0, 3), (0.2, 3), (0.5, 40), (1, 900)])
    steps = 20_000
    assert table.mean() == pytest.approx(
        fmean(table.quantile((step + 0.5) / steps) for step in range(steps)), rel=1e-4
    )


def test_fixed_uniform_and_lognormal_lengths_are_what_they_say():
    prompt, output = draw(
        {"prompt": 7, "output": {"name": "uniform", "min_tokens": 2, "max_tokens": 4}}
    )
    assert set(prompt) == {7}
    assert [output.count(tokens) / NUM_DRAWS for tokens in (2, 3, 4)] == pytest.approx(
        [1 / 3] * 3, rel=0.03
    )
    lognormal = {"name": "lognormal", "median_tokens": 200, "sigma": 0.5, "max_tokens": 100_000}
    prompt, _ = draw({"prompt": lognormal, "output": 1})
    assert fmean(prompt) == pytest.approx(200 * 2.718281828**0.125, rel=0.02)
    assert quantiles(prompt, n=2) == pytest.approx([200], rel=0.02)


def test_lognormal_lengths_beyond_the_limit_are_drawn_again_not_piled_up_there():
    lognormal = {"name": "lognormal", "median_tokens": 100, "sigma": 1.0, "max_tokens": 200}
    prompt, _ = draw({"prompt": lognormal, "output": 1})
    assert max(prompt) == 200
    assert prompt.count(200) < 0.01 * NUM_DRAWS


@given(st.sampled_from(["sharegpt_8k", "arxiv_summarization"]), st.integers(0, 2**32))
def test_lengths_of_a_dataset_that_was_cut_stay_within_its_limit(dataset, seed):
    limit = {"sharegpt_8k": 8192, "arxiv_summarization": 16384}[dataset]
    for prompt, output in zip(*draw(dataset, num_draws=50, seed=seed), strict=True):
        assert prompt >= 1
        assert output >= 1
        assert prompt + output <= limit


def test_prompt_and_output_that_are_too_long_shrink_in_proportion():
    assert draw({"prompt": 300, "output": 100, "max_total_tokens": 40}, 1) == [(30,), (10,)]
    assert draw({"prompt": 10_000, "output": 1, "max_total_tokens": 2}, 1) == [(1,), (1,)]
    assert draw({"prompt": 300, "output": 100, "max_total_tokens": 400}, 1) == [(300,), (100,)]
