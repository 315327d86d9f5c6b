"""What is worked out of a load, on records whose figures can be told by hand."""

import re
import subprocess

import pytest

from gllm_ray.bench.load_generator import Load, RequestRecord
from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.source_commit import source_commit
from gllm_ray.simulation.metrics import Slo


def record(start_s, message_times_s, num_output_tokens, *, error="", lag_s=0.0):
    return RequestRecord(
        start_s=start_s,
        lag_s=lag_s,
        message_times_s=message_times_s,
        num_prompt_tokens=10,
        num_output_tokens=num_output_tokens,
        error=error,
    )


LOAD = Load(
    10.0,
    [
        record(100.0, [101.0, 102.0, 104.0], 5),
        record(101.0, [104.0], 1, lag_s=0.25),
        record(102.0, [103.0], 1, error="refused"),
    ],
)


def test_latencies_count_from_when_a_request_was_to_be_sent():
    figures = RequestFigures.of(LOAD)
    assert figures.ttft_s.mean == pytest.approx((1 + 3) / 2)
    assert figures.e2e_s.mean == pytest.approx((4 + 3) / 2)
    assert figures.max_lag_s == 0.25


def test_tpot_is_over_tokens_and_itl_over_messages():
    figures = RequestFigures.of(LOAD)
    assert figures.tpot_s.mean == pytest.approx(3 / 4)  # one token has none
    assert figures.itl_s.mean == pytest.approx(3 / 2)


def test_what_failed_counts_as_an_error_and_in_no_figure():
    figures = RequestFigures.of(LOAD)
    assert (figures.num_finished, figures.num_failed) == (2, 1)
    assert figures.errors == {"refused": 1}
    assert (figures.num_input_tokens, figures.num_output_tokens) == (20, 6)
    assert figures.requests_per_s == pytest.approx(0.2)
    assert figures.output_tokens_per_s == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("slo", "num_good"),
    [
        (None, 2),
        (Slo(ttft_s=2.0), 1),
        (Slo(tpot_s=0.7), 1),  # a single token has none to exceed it
        (Slo(tpot_s=0.8, e2e_s=4.0), 2),
        (Slo(e2e_s=0.5), 0),
    ],
)
def test_goodput_is_what_met_the_slo_as_a_share_of_all_failed_ones_too(slo, num_good):
    figures = RequestFigures.of(LOAD, slo)
    assert figures.goodput_per_s == pytest.approx(num_good / 10)
    assert figures.goodput_ratio == pytest.approx(num_good / 3)


def test_a_load_of_which_nothing_finished_has_figures_too():
    figures = RequestFigures.of(Load(1.0, [record(0.0, [], 0, error="down")]), Slo(ttft_s=1.0))
    assert (figures.num_finished, figures.goodput_ratio, figures.ttft_s.p99) == (0, 0.0, 0.0)


def test_the_commit_is_of_the_source_and_not_of_the_repository_around_an_environment(tmp_path):
    def git(*arguments):
        identity = ("-c", "user.name=a", "-c", "user.email=a@example.com")
        subprocess.run(["git", *identity, *arguments], cwd=tmp_path, check=True)

    for name in ("theirs.py", "ours.py"):
        (tmp_path / name).touch()
    assert source_commit(tmp_path / "ours.py") is None
    git("init", "-q")
    git("add", "theirs.py")
    git("commit", "-qm", "theirs")
    assert source_commit(tmp_path / "ours.py") is None
    git("add", "ours.py")
    git("commit", "-qm", "ours")
    assert re.fullmatch("[0-9a-f]{12}", source_commit(tmp_path / "ours.py"))
