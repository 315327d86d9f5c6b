"""Charts: what they show, that they are drawn, and what is said where they cannot be."""

import re
import sys
from importlib.util import find_spec

import pytest

from gllm_ray.errors import ConfigError
from gllm_ray.simulation import plots
from gllm_ray.simulation.metrics import StageInterval
from gllm_ray.simulation.quantile_sketch import QuantileSketch
from tests.unit.simulation.runs import INTERVALS

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib, the plots extra, is not installed"
)


def latencies():
    sketch = QuantileSketch()
    for milliseconds in range(1, 100):
        sketch.add(milliseconds / 1000)
    return sketch


TITLE = "what it shows"
SPANS_S = [(0.0, 4.0), (0.0, 4.0)]
CHARTS = {
    "pipeline": lambda path: plots.plot_pipeline(INTERVALS, path, title=TITLE),
    "pipelines": lambda path: plots.plot_pipelines({TITLE: INTERVALS, "nothing": []}, path),
    "utilization": lambda path: plots.plot_utilization(
        INTERVALS, path, spans_s=SPANS_S, num_stages=2, end_s=4.0, title=TITLE
    ),
    "cdf": lambda path: plots.plot_latency_cdf({"balanced": latencies()}, path, title=TITLE),
    "curve": lambda path: plots.plot_throughput_latency(
        {"balanced": [(100, 0.05), (200, 0.4)]}, path, title=TITLE
    ),
}


@needs_matplotlib
@pytest.mark.parametrize(("suffix", "start"), [(".png", b"\x89PNG"), (".svg", b"<?xml")])
@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_is_written_in_the_format_of_its_name(tmp_path, chart, suffix, start):
    path = tmp_path / f"{chart}{suffix}"
    CHARTS[chart](path)
    assert path.read_bytes().startswith(start)


@pytest.mark.parametrize("chart", CHARTS)
def test_other_formats_are_refused(tmp_path, chart):
    with pytest.raises(ConfigError, match=r"chart\.pdf: must end in \.png or \.svg"):
        CHARTS[chart](tmp_path / "chart.pdf")


def test_a_missing_matplotlib_is_told_with_the_extra_that_brings_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ConfigError, match=r"pip install 'gllm_ray\[plots\]'"):
        CHARTS["pipeline"](tmp_path / "chart.png")
    assert not (tmp_path / "chart.png").exists()


def texts_of(svg):
    """What is written in a chart; the letters themselves are shapes."""
    return re.findall("<!-- (.+) -->", svg.read_text(encoding="utf-8"))


@needs_matplotlib
def test_a_bar_has_its_label_only_where_that_fits(tmp_path):
    path = tmp_path / "chart.svg"
    bars = [StageInterval(0, 0, 0.0, 9.9, "wide"), StageInterval(0, 1, 9.9, 10.0, "narrow")]
    plots.plot_pipeline(bars, path)
    assert "wide" in texts_of(path)
    assert "narrow" not in texts_of(path)


@needs_matplotlib
@pytest.mark.parametrize(
    ("window_s", "labels"), [((0.0, 4.0), {"a"}), ((2.0, 6.0), {"a", "b"}), ((3.99, 9.0), {"b"})]
)
def test_a_window_shows_the_labels_that_fit_what_it_shows_of_their_bars(tmp_path, window_s, labels):
    path = tmp_path / "chart.svg"
    bars = [StageInterval(0, 0, 0.0, 4.0, "a"), StageInterval(0, 1, 4.0, 8.0, "b")]
    plots.plot_pipeline(bars, path, window_s=window_s)
    assert {"a", "b"} & set(texts_of(path)) == labels


@needs_matplotlib
def test_only_several_replicas_are_named(tmp_path):
    path = tmp_path / "chart.svg"
    plots.plot_pipelines({"two": INTERVALS, "one": INTERVALS[:2]}, path)
    texts = texts_of(path)
    assert {"replica 0, stage 0", "replica 0, stage 1", "replica 1, stage 0"} <= set(texts)
    assert {"stage 0", "stage 1"} <= set(texts)


@needs_matplotlib
def test_the_frontier_is_that_of_several_curves_and_a_limit_is_named(tmp_path):
    curve = [(100, 0.05), (200, 0.4)]
    one, two = tmp_path / "one.svg", tmp_path / "two.svg"
    plots.plot_throughput_latency({"a": curve}, one)
    plots.plot_throughput_latency({"a": curve, "b": [(150, 0.5)]}, two, limit_s=0.3)
    assert not {"frontier", "limit 0.3 s"} & set(texts_of(one))
    assert {"frontier", "limit 0.3 s"} <= set(texts_of(two))


@needs_matplotlib
def test_a_chart_ends_at_the_triple_of_a_limit(tmp_path):
    curve = [(100, 0.05), (200, 40.0)]
    with_limit, without = tmp_path / "limit.svg", tmp_path / "none.svg"
    plots.plot_throughput_latency({"a": curve}, with_limit, limit_s=0.5)
    plots.plot_throughput_latency({"a": curve}, without)
    assert "1.4" in texts_of(with_limit)
    assert "40" not in texts_of(with_limit)
    assert "40" in texts_of(without)


@needs_matplotlib
@pytest.mark.parametrize("chart", CHARTS)
def test_a_chart_has_its_title(tmp_path, chart):
    path = tmp_path / "chart.svg"
    CHARTS[chart](path)
    assert TITLE in texts_of(path)


def utilization(*, end_s, num_bins, spans_s=SPANS_S):
    return plots.utilization_over_time(
        INTERVALS, spans_s, num_stages=2, end_s=end_s, num_bins=num_bins
    )


def test_utilization_over_time_is_the_share_of_each_span_that_was_busy():
    assert utilization(end_s=3.0, num_bins=6) == {
        (0, 0): pytest.approx([1, 1, 0, 0, 0, 1]),
        (0, 1): pytest.approx([0, 0, 1, 1, 0, 0]),
        (1, 0): pytest.approx([0, 1, 0.5, 0, 0, 0]),
        (1, 1): [0] * 6,
    }


def test_what_comes_after_the_end_is_cut_off():
    shares = utilization(end_s=0.75, num_bins=1)
    assert shares[0, 0] == pytest.approx([1])
    assert shares[0, 1] == [0]
    assert shares[1, 0] == pytest.approx([1 / 3])


def test_a_replica_is_not_idle_while_it_does_not_run():
    shares = utilization(end_s=3.0, num_bins=6, spans_s=[(0.0, 3.0), (0.5, 1.25), (9.0, 9.0)])
    assert shares[1, 0] == [None, pytest.approx(1), pytest.approx(1), None, None, None]
    assert shares[2, 1] == [None] * 6
