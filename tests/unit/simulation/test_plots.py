"""Charts: what they show, that they are drawn, and what is said where they cannot be."""

import sys
from importlib.util import find_spec

import pytest

from gllm_ray.errors import ConfigError
from gllm_ray.simulation import plots
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


CHARTS = {
    "pipeline": lambda path: plots.plot_pipeline(INTERVALS, path),
    "utilization": lambda path: plots.plot_utilization(INTERVALS, path, end_s=4.0),
    "cdf": lambda path: plots.plot_latency_cdf({"balanced": latencies()}, path),
    "curve": lambda path: plots.plot_throughput_latency(
        {"balanced": [(100, 0.05), (200, 0.4)]}, path
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


def test_utilization_over_time_is_the_share_of_each_span_that_was_busy():
    shares = plots.utilization_over_time(INTERVALS, end_s=3.0, num_bins=6)
    assert shares == {
        (0, 0): pytest.approx([1, 1, 0, 0, 0, 1]),
        (0, 1): pytest.approx([0, 0, 1, 1, 0, 0]),
        (1, 0): pytest.approx([0, 1, 0.5, 0, 0, 0]),
    }


def test_what_comes_after_the_end_is_cut_off():
    shares = plots.utilization_over_time(INTERVALS, end_s=0.75, num_bins=1)
    assert shares[0, 0] == pytest.approx([1])
    assert shares[0, 1] == [0]
    assert shares[1, 0] == pytest.approx([1 / 3])
