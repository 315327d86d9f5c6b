"""`gllm-ray simulate`: its table, its files, and what it says of a mistake."""

import json
import re
import subprocess
import sys
from importlib.util import find_spec

import pytest
import yaml

from gllm_ray.cli import main
from gllm_ray.simulation import simulate
from gllm_ray.simulation.report_table import format_report
from tests.unit.simulation.simulations import SMALL, changed

needs_matplotlib = pytest.mark.skipif(
    find_spec("matplotlib") is None, reason="matplotlib, the plots extra, is not installed"
)


@pytest.fixture
def small(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


def run(*arguments):
    return main(["simulate", *map(str, arguments)])


def test_the_table_is_the_report_and_names_what_is_not_calibrated(small, capsys):
    assert run(small) == 0
    table = format_report(simulate(small).report)
    note = "nominal constants, not fitted to measurements: link pcie-4-x16, host graphs"
    assert capsys.readouterr() == (f"{table}\n\n{note}\n", "")


def test_the_json_is_the_report(small, tmp_path):
    assert run(small, "--json", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report == json.loads(json.dumps(simulate(small).report.to_json()))


@pytest.mark.parametrize(
    ("option", "changes"),
    [
        (["--policy", "temporal"], {"scheduler": {"policy": "temporal"}}),
        (["--seed", "5"], {"seed": 5}),
    ],
)
def test_an_option_stands_for_a_key_of_the_file(small, tmp_path, option, changes):
    assert run(small, *option, "--json", tmp_path / "report.json") == 0
    report = json.loads((tmp_path / "report.json").read_text())
    expected = simulate(changed(changes)).report
    assert report == json.loads(json.dumps(expected.to_json()))
    assert expected != simulate(small).report


def test_the_trace_has_each_micro_batch_in_each_stage(small, tmp_path):
    assert run(small, "--trace", tmp_path / "trace.json") == 0
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    places = [(event["tid"], event["args"]["batch_id"]) for event in events if event["ph"] == "X"]
    num_micro_batches = simulate(small).report.num_micro_batches
    assert sorted(places) == [(stage, i) for stage in (0, 1) for i in range(num_micro_batches)]


@needs_matplotlib
@pytest.mark.parametrize(
    ("option", "label"),
    [
        ("--plot-gantt", "stage 1"),
        ("--plot-utilization", "stage utilization"),
        ("--plot-latencies", "queue time"),
    ],
)
def test_a_chart_is_drawn(small, tmp_path, option, label, monkeypatch):
    import matplotlib

    monkeypatch.setitem(matplotlib.rcParams, "svg.fonttype", "none")
    assert run(small, option, tmp_path / "chart.svg") == 0
    assert label in (tmp_path / "chart.svg").read_text()


@needs_matplotlib
def test_the_gantt_chart_begins_where_it_is_told_and_has_all_that_computes_meanwhile(
    small, tmp_path, monkeypatch
):
    drawn = []
    plots = "gllm_ray.simulation.outputs.plot_pipeline"
    monkeypatch.setattr(plots, lambda bars, _, window_s: drawn.append((bars, window_s)))
    prompts = {"arrivals": "at_once", "num_requests": 90, "lengths": {"prompt": 900, "output": 1}}
    uneven = {"num_stages": 4, "layers": [3, 5, 4, 4]}
    small.write_text(yaml.safe_dump(changed({"workload": prompts, "pipeline": uneven})))
    result = simulate(small, keep_intervals=True)
    half_s = result.report.wall_s / 2
    assert run(small, "--plot-gantt", tmp_path / "a.svg", "--gantt-start-s", half_s / 2) == 0
    assert run(small, "--plot-gantt", tmp_path / "a.svg") == 0
    for (bars, (start_s, end_s)), asked_s in zip(drawn, (half_s / 2, half_s), strict=True):
        assert asked_s <= start_s < asked_s + 0.1 * half_s
        shown = [bar for bar in result.intervals if bar.start_s < end_s and bar.end_s > start_s]
        assert bars == shown
        assert any(bar.start_s < start_s for bar in bars)
        assert any(bar.end_s > end_s for bar in bars)


def test_a_sweep_prints_a_line_for_each_rate_and_writes_all_reports(small, tmp_path, capsys):
    assert run(small, "--sweep", "5,50", "--json", tmp_path / "reports.json") == 0
    head, slow, fast, *_ = capsys.readouterr().out.splitlines()
    assert head.startswith("requests/s  finished/s")
    assert [line.split()[0] for line in (slow, fast)] == ["5", "50"]
    slow, fast = json.loads((tmp_path / "reports.json").read_text())
    assert (slow["rate_per_s"], fast["rate_per_s"]) == (5, 50)
    expected = simulate(changed({"workload.arrivals": 50})).report
    assert fast["report"] == json.loads(json.dumps(expected.to_json()))
    assert slow["report"]["requests_per_s"] < fast["report"]["requests_per_s"]


@needs_matplotlib
def test_a_sweep_is_drawn(small, tmp_path):
    assert run(small, "--sweep", "5,50", "--plot-sweep", tmp_path / "curve.png") == 0
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


def test_a_rate_at_which_too_many_requests_would_come_is_refused(small, capsys):
    changes = {"workload.num_requests": ..., "workload.duration_s": 2}
    small.write_text(yaml.safe_dump(changed(changes)))
    assert run(small, "--sweep", "5,1e8") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("at 1e+08 requests/s: workload.duration_s=2: about 2e+08 requests come")


def test_a_sweep_needs_arrivals_with_a_rate(tmp_path, capsys):
    path = tmp_path / "batch.yaml"
    path.write_text(yaml.safe_dump(changed({"workload.arrivals": "at_once"})))
    assert run(path, "--sweep", "5") == 1
    out, err = capsys.readouterr()
    must = (
        "must be poisson or gamma for a sweep; give a rate, such as `arrivals: 2`, or name: gamma"
    )
    assert (out, err) == ("", f"workload.arrivals=at_once: {must}\n")


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"hardware.device": "L2"}, r"small\.yaml: hardware\.device='L2': must be one of"),
        ({"kv_cache.num_blocks": 1}, r"the KV cache is too small: .* on stage \d"),
        ({"model": {"path": "none", "max_model_len": 9}}, r"model\.path='.*none': "),
        ({"workload": {"name": "trace", "path": "none.csv"}}, r"none\.csv"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_1(small, capsys, changes, mistake):
    small.write_text(yaml.safe_dump(changed(changes)))
    assert run(small) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(mistake, err)
    assert err.count("\n") == 1


def test_a_chart_that_cannot_be_drawn_is_told_before_the_run(small, tmp_path, capsys):
    assert run(small, "--plot-latencies", tmp_path / "a.pdf") == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert re.search(r"a\.pdf: must end in \.png or \.svg", err)


@needs_matplotlib
def test_a_gantt_chart_without_a_bar_is_refused(small, tmp_path, capsys):
    assert run(small, "--plot-gantt", tmp_path / "a.svg", "--gantt-start-s", "99") == 1
    assert "--gantt-start-s 99: no micro-batch begins then or later" in capsys.readouterr().err
    assert not (tmp_path / "a.svg").exists()


def test_the_table_says_why_requests_cannot_be_served(small, capsys):
    small.write_text(yaml.safe_dump(changed({"workload.lengths": {"prompt": 3000, "output": 1}})))
    assert run(small) == 0
    assert re.search(
        r"\n40 requests cannot be served, the first because .*2048", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "mistake"),
    [
        (["--sweep", "1", "--trace", "x"], "--trace does not go with --sweep"),
        (["--sweep", "1", "--gantt-start-s", "0"], "--gantt-start-s does not go with --sweep"),
        (["--plot-sweep", "x.svg"], "--plot-sweep does not go without --sweep"),
        (["--gantt-start-s", "1"], "--gantt-start-s does not go without --plot-gantt"),
        (["--sweep", "1,0"], "'1,0': must be numbers > 0"),
        (["--sweep", "a"], "'a': must be numbers > 0"),
        (["--policy", "best"], "invalid choice: 'best'"),
    ],
)
def test_wrong_usage_exits_with_2(small, capsys, options, mistake):
    with pytest.raises(SystemExit) as caught:
        run(small, *options)
    assert caught.value.code == 2
    assert mistake in capsys.readouterr().err


def test_a_simulation_loads_neither_ray_nor_torch(small):
    code = (
        "import sys, gllm_ray.cli as cli; "
        "assert cli.main(['simulate', sys.argv[1]]) == 0; "
        "heavy = {'ray', 'torch', 'transformers', 'fastapi', 'matplotlib'}; "
        "print(sorted(heavy & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, small], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout.splitlines()[-1] == "[]"
