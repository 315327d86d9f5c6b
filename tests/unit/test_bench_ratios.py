"""Two services in turns: their ratios, pair by pair, and the tables of results."""

import json
import os
import re
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest

from gllm_ray.bench.conditions import Conditions, own_cpu_s, part_clocks, watch_conditions
from gllm_ray.bench.load_generator import Load, RequestRecord
from gllm_ray.bench.paired_ratios import Pair, paired_ratios
from gllm_ray.bench.request_figures import RequestFigures
from gllm_ray.bench.request_load import RequestLoad, parse_workload, synthetic_workload
from gllm_ray.bench.request_run import RequestRun
from gllm_ray.bench.result_file import read_result
from gllm_ray.bench.result_table import result_tables
from gllm_ray.cli import main


def run(wall_s, *, cpu_s=None, num_failed=0):
    """A run of two requests that take `wall_s` each."""
    records = [
        RequestRecord(
            start_s=0.0,
            lag_s=0.0,
            message_times_s=[wall_s / 2, wall_s],
            num_prompt_tokens=5,
            num_output_tokens=2,
            error="down" if index < num_failed else "",
        )
        for index in range(2)
    ]
    return RequestRun(
        figures=RequestFigures.of(Load(wall_s, records)),
        conditions=Conditions(load_average_before=1.0, cpu_s=cpu_s or {}),
    )


def test_each_run_is_compared_with_the_one_beside_it():
    pairs = [Pair(run(1.0), run(2.0)), Pair(run(10.0), run(30.0)), Pair(run(4.0), run(4.0))]
    ratios = paired_ratios(pairs)
    throughput = ratios["output_tokens_per_s"]
    assert throughput.pairs == pytest.approx((2.0, 3.0, 1.0))
    assert (throughput.median, throughput.least, throughput.most) == pytest.approx((2.0, 1.0, 3.0))
    assert ratios["ttft_p50_s"].pairs == pytest.approx((1 / 2, 1 / 3, 1.0))


def test_a_run_that_failed_requests_is_faster_than_nobody():
    ratios = paired_ratios([Pair(run(1.0, num_failed=1), run(2.0)), Pair(run(1.0), run(2.0))])
    assert ratios["output_tokens_per_s"].pairs == (None, 2.0)
    assert ratios["output_tokens_per_s"].median == 2.0
    nothing = paired_ratios([Pair(run(1.0), run(2.0, num_failed=2))])["ttft_p50_s"]
    assert (nothing.pairs, nothing.median) == ((None,), None)


def test_cpu_seconds_are_those_of_the_service_that_was_asked():
    a, b = run(1.0, cpu_s={"a": 3.0, "b": 0.1}), run(1.0, cpu_s={"a": 0.2, "b": 2.0})
    assert paired_ratios([Pair(a, b)])["cpu_s"].pairs == (1.5,)
    unknown = run(1.0, cpu_s={"a": 0.2})
    assert paired_ratios([Pair(a, unknown)])["cpu_s"].pairs == (None,)


def test_cpu_seconds_are_those_of_what_ran_within():
    with watch_conditions({"self": own_cpu_s}) as conditions:
        end_s = own_cpu_s() + 0.05
        while own_cpu_s() < end_s:
            pass
    assert 0.04 < conditions.cpu_s["self"] < 0.5


def test_cpu_seconds_are_told_apart_by_what_processes_are_called():
    work = "import time\nwhile time.process_time() < 0.1: pass\nprint(flush=True); input()"
    command = ["/somewhere/haproxy", "-c", work]
    with subprocess.Popen(
        command, executable=sys.executable, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as process:
        process.stdout.readline()
        cpu_s = {name: clock() for name, clock in part_clocks(os.getpid()).items()}
        process.communicate(b"\n")
    assert 0.05 < cpu_s.pop("proxy") < 5
    assert set(cpu_s.values()) == {0.0}


LOAD = RequestLoad(
    workload=parse_workload(synthetic_workload("5", "sharegpt") | {"num_requests": 2}),
    seed=0,
    max_concurrency=8,
    num_warmups=0,
    slo=None,
).to_json()
COMMON = {
    "format": "gllm_ray.bench.v1",
    "time": "2026-01-02T03:04:05+00:00",
    "machine": {"hardware": "a CPU", "num_cores": 2, "versions": {"ray": "2"}, "commit": None},
}


def write(path, **content):
    path.write_text(json.dumps(COMMON | content), encoding="utf-8")
    return str(path)


def table_of(capsys, *arguments):
    assert main(["bench", "table", *arguments]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in cells if len(row) > 1 and row[0] != "---"], lines


def test_results_of_one_kind_are_rows_of_one_table(tmp_path, capsys):
    files = [
        write(
            tmp_path / f"{name}.json",
            benchmark=name,
            target="m",
            load=LOAD,
            run=run(0.5, cpu_s={"service": 2.5}).to_json(),
        )
        for name in ("engine", "serve")
    ]
    rows, lines = table_of(capsys, *files, "--percentile-metrics", "ttft")
    head, *values = rows
    assert [row[0] for row in values] == ["engine", "serve"]
    engine = dict(zip(head, values[0], strict=True))
    assert engine["load"] == "2, at once; 5 in, sharegpt out; 8 at a time"
    assert (engine["requests/s"], engine["output tokens/s"]) == ("4.00", "8.0")
    assert (engine["TTFT ms"], engine["CPU s"], engine["failed"]) == ("250 / 250 / 250", "2.5", "0")
    assert "TPOT ms" not in engine
    assert lines.count("a CPU, 2 cores; ray 2; commit unknown; 2026-01-02") == 1


def write_comparison(path, pairs, **content):
    ratios = {
        name: {
            "pairs": ratio.pairs,
            "median": ratio.median,
            "least": ratio.least,
            "most": ratio.most,
        }
        for name, ratio in paired_ratios(pairs).items()
    }
    runs = [{"a": pair.a.to_json(), "b": pair.b.to_json()} for pair in pairs]
    content = {"a": "ours", "b": "peer", "load": LOAD, "pairs": runs, "ratios": ratios} | content
    return write(path, benchmark="compare", **content)


def test_a_comparison_shows_both_runs_and_the_ratio_of_each_pair(tmp_path, capsys):
    pairs = [Pair(run(1.0), run(2.0)), Pair(run(1.0), run(4.0, num_failed=1))]
    file = write_comparison(tmp_path / "compare.json", pairs)
    rows, _ = table_of(capsys, file, "--percentile-metrics", "e2el")
    assert rows[0][:3] == ["pair", "output tokens/s", "E2E p50 ms"]
    shown = {row[0]: row[1] for row in rows[1:]}
    assert shown == {
        "1 A": "4.0",
        "1 B": "2.0",
        "1 A/B": "2.00",
        "2 A": "4.0",
        "2 B": "0.5",
        "2 A/B": "-",
        "median A/B": "2.00",
        "least to most": "2.00 to 2.00",
    }


def test_of_several_comparisons_each_is_a_row_of_its_ratios(tmp_path, capsys):
    faster, failed = Pair(run(1.0), run(2.0)), Pair(run(1.0), run(4.0, num_failed=1))
    files = [
        write_comparison(tmp_path / "1.json", [faster, Pair(run(1.0), run(3.0))]),
        write_comparison(tmp_path / "2.json", [failed]),
        write_comparison(tmp_path / "3.json", [faster], b="another"),
    ]
    rows, lines = table_of(capsys, *files, "--percentile-metrics", "e2el")
    assert lines[0] == "1. A: `ours`; B: `peer`"
    assert "2. A: `ours`; B: `another`" in lines
    columns = ["services", "pairs", "output tokens/s A/B", "E2E p50 A/B"]
    cells = [dict(zip(rows[0], row, strict=True)) for row in rows[1:]]
    assert [[row[column] for column in columns] for row in cells] == [
        ["1", "2", "**2.50** (2.00 to 3.00)", "**0.42** (0.33 to 0.50)"],
        ["1", "1", "-", "-"],
        ["2", "1", "**2.00** (2.00 to 2.00)", "**0.50** (0.50 to 0.50)"],
    ]


def test_comparisons_on_different_hardware_tell_which(tmp_path, capsys):
    pairs = [Pair(run(1.0), run(2.0))]
    files = [
        write_comparison(
            tmp_path / f"{name}.json", pairs, machine=COMMON["machine"] | {"hardware": name}
        )
        for name in ("one CPU", "another")
    ]
    rows, lines = table_of(capsys, *files, "--percentile-metrics", "e2el")
    assert lines[0] == "1. A: `ours`; B: `peer`; on one CPU"
    assert "2. A: `ours`; B: `peer`; on another" in lines
    assert [row[0] for row in rows[1:]] == ["1", "2"]


@pytest.mark.parametrize("text", ["{}", "no JSON", '{"format": "gllm_ray.bench.v0"}'])
def test_what_is_no_result_has_no_table(tmp_path, capsys, text):
    file = tmp_path / "other.json"
    file.write_text(text, encoding="utf-8")
    assert main(["bench", "table", str(file)]) == 1
    assert f"{file}: must be JSON of format gllm_ray.bench.v1" in capsys.readouterr().err


ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "gllm_ray/bench/results"


def committed(*names):
    return [read_result(RESULTS / f"{name}.json") for name in names]


def test_the_results_have_the_tables_of_the_committed_files():
    everything = (RESULTS / "README.md").read_text("utf-8")
    kinds = ("", "_direct", "_one", "_direct_one")
    stages = [f"stage_{size}{kind}" for size in ("15m", "500m") for kind in kinds]
    names = ("serve", "engine", "stage", *stages, "transport", "front", "compare")
    assert result_tables(committed(*names), ["ttft", "tpot"]) in everything
    assert result_tables(committed("recovery")) in everything
    beside_vllm = sorted(file.stem for file in RESULTS.glob("compare_vllm_*.json"))
    assert result_tables(committed(*beside_vllm), ["ttft", "tpot"]) in everything


def test_the_readme_has_the_committed_ratios_beside_vllm():
    loads = {
        "poisson50": "one by one, at half of the rate of vLLM's burst",
        "poisson85": "one by one, at 85 % of it",
        "burst": "64 at once",
        "burst_direct": "64 at once, `control_plane: direct`",
    }
    figures = ("output_tokens_per_s", "ttft_p50_s", "tpot_p99_s")
    table = ["| requests | output tokens/s | TTFT p50 | TPOT p99 |", "|---|---|---|---|"]
    for name, requests in loads.items():
        (result,) = committed(f"compare_vllm_epyc_{name}")
        cells = [f"{result['ratios'][figure]['median']:.2f} x" for figure in figures]
        table.append(f"| {' | '.join([requests, *cells])} |")
    assert "\n\n" + "\n".join(table) + "\n\n" in (ROOT / "README.md").read_text("utf-8")


def test_the_readme_tells_the_committed_ratio_of_two_stages_to_one():
    (result,) = committed("compare_stages_bfloat16_direct")
    told = f"[{result['ratios']['output_tokens_per_s']['median']:.2f} x]"
    assert f"{told}(gllm_ray/bench/results/README.md#two-stages-beside-one)" in (
        ROOT / "README.md"
    ).read_text("utf-8")


def test_the_readme_tells_the_committed_pauses_of_recovery():
    (result,) = committed("recovery")
    pauses = [each["pause_s"] for each in result["recoveries"]]
    told = f"[{min(pauses):.1f} to {max(pauses):.1f} s](gllm_ray/bench/results/README.md#recovery)"
    assert told in (ROOT / "README.md").read_text("utf-8")


def served_over_bare(name):
    (result,) = committed(name)
    ratios = [each["served_tokens_per_s"] / each["bare_tokens_per_s"] for each in result["rounds"]]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def test_the_readme_tells_the_committed_overhead_over_bare_stages():
    spans = [served_over_bare(f"stage_500m_direct{kind}") for kind in ("", "_one")]
    text = " ".join((ROOT / "README.md").read_text("utf-8").split())
    assert f"[{spans[0]}](gllm_ray/bench/results/README.md#serving-stages-hops-proxies)" in text
    assert f"and {spans[1]} with one stage" in text


def test_the_summary_of_the_results_tells_the_committed_overhead_over_bare_stages():
    summary = (RESULTS / "README.md").read_text("utf-8")
    sizes = {"15 M": "15m", "0.5 B": "500m"}
    kinds = {"one stage": "_one", "two stages": ""}
    for (model, size), (stages, kind) in product(sizes.items(), kinds.items()):
        (row,) = re.findall(rf"\| (?:tokens/s, )?{model} model, {stages} \|(.*)", summary)
        direct, refs = (served_over_bare(f"stage_{size}{how}{kind}") for how in ("_direct", ""))
        assert f"`direct` {direct}; `refs` {refs}" in row


@pytest.mark.parametrize(
    ("row", "names"),
    [
        ("EPYC, bfloat16, one by one, 85 % load", ["epyc_poisson85"]),
        ("EPYC, bfloat16, half load", ["epyc_poisson50"]),
        ("EPYC, bfloat16, shared prefix, 3 a second", ["epyc_prefix"]),
        ("EPYC, bfloat16, bursts", ["epyc_500m", "epyc_burst", "epyc_burst_direct"]),
        (
            "Xeon, bfloat16, one pair each",
            ["500m_bfloat16", "bfloat16", "bfloat16_poisson85"],
        ),
        ("Xeon, float32, one by one, 85 % load", ["poisson85"]),
        ("Xeon, float32, half load", ["poisson50"]),
        ("Xeon, float32, shared prefix, 1 a second", ["prefix"]),
        ("Xeon, float32, bursts", ["500m_burst", "burst"]),
    ],
)
def test_the_summary_of_the_results_tells_the_committed_ratios_beside_vllm(row, names):
    results = committed(*(f"compare_vllm_{name}" for name in names))
    spans = []
    for figure in ("output_tokens_per_s", "tpot_p99_s", "ttft_p50_s"):
        medians = sorted({f"{each['ratios'][figure]['median']:.2f}" for each in results})
        spans.append(" to ".join(dict.fromkeys((medians[0], medians[-1]))))
    summary = (RESULTS / "README.md").read_text("utf-8")
    (line,) = [line for line in summary.splitlines() if f"| {row} |" in line]
    assert f"| {'; '.join(spans)} x |" in line
