import json
from dataclasses import replace
from pathlib import Path

import pytest

from gllm_ray.bench.policies import bench_policies
from gllm_ray.bench.policy_hardware import pipeline_cost, round_trip_s
from gllm_ray.bench.policy_reproduction import claims
from gllm_ray.bench.policy_runs import Case, Effort, at_rate, simulate
from gllm_ray.bench.policy_scenarios import OURS, SCENARIOS, Contender, contenders
from gllm_ray.bench.policy_table import policy_table
from gllm_ray.bench.sarathi_setups import SETUPS
from gllm_ray.cli import main
from gllm_ray.policy_config import BalancedConfig
from gllm_ray.scheduling.load import StepLoad

RESULTS = Path(__file__).parents[2] / "gllm_ray/bench/results"
TINY = replace(SCENARIOS[0], rates_per_s=(4,))
EFFORT = Effort(
    duration_s=0.5, max_requests=2, num_offline=3, seeds=(0, 1), capacity_ratio=float("inf")
)


@pytest.fixture(scope="module")
def results():
    return bench_policies([TINY], EFFORT, num_processes=1)


def test_every_setting_is_run_at_every_rate_and_offline(results):
    (scenario,) = results["scenarios"]
    names = list(contenders(TINY))
    cells = [(run["policy"], run["rate_per_s"]) for run in scenario["runs"]]
    assert cells == [(name, rate) for rate in (4, None) for name in names]
    assert list(scenario["slo_capacity_per_s"]) == names


def test_a_cell_is_the_mean_of_its_own_seeds(results):
    contender = contenders(TINY)[OURS]
    cases = [at_rate(contender, EFFORT, seed, 4) for seed in EFFORT.seeds]
    values = [simulate(case)["tokens_per_s"] for case in cases]
    (cell,) = [
        run
        for run in results["scenarios"][0]["runs"]
        if (run["policy"], run["rate_per_s"]) == (OURS, 4)
    ]
    assert values[0] != values[1]
    assert cell["tokens_per_s"] == pytest.approx(sum(values) / 2)


def test_a_run_has_the_requests_of_its_time_up_to_the_most():
    effort = Effort(duration_s=100, max_requests=1000, num_offline=7)
    assert [effort.num_requests(rate) for rate in (0.001, 2, 50, None)] == [1, 200, 1000, 7]
    assert effort.quarter().num_requests(50) == 250


def test_the_table_names_every_setting_and_says_first_which_goals_are_missed(results):
    results = json.loads(json.dumps(results))
    table = policy_table(results)
    for name in contenders(TINY):
        assert table.count(f"| {name} |") == 2
    summary = table[: table.index("## SLO capacity")]
    assert "missed" in summary
    (scenario,) = results["scenarios"]
    for run in scenario["runs"]:
        if run["policy"] == OURS:
            run |= {"tokens_per_s": 10**6, "utilization": 1.0, "ideal_ratio": 1.0}
            run |= {"ttft_p90_s": 0.0, "tpot_p99_s": 0.0}
    scenario["slo_capacity_per_s"][OURS] = 10**6
    assert "missed" not in policy_table(results)


@pytest.mark.parametrize(
    "name",
    [
        "policies",
        "policies_seeds_0_2",
        "policies_h100",
        "policies_h100_seeds_0_2",
        "reproduction",
    ],
)
def test_the_committed_tables_are_those_of_the_committed_results(name):
    file = RESULTS / f"{name}.json"
    table = policy_table(json.loads(file.read_text("utf-8")))
    assert table == file.with_suffix(".md").read_text("utf-8")


def test_measured_prefills_are_met_by_the_cost_of_the_l20():
    cost = pipeline_cost(SCENARIOS[0].hardware)
    for rows, time_s in ((1, 0.08551), (256, 0.15587), (2048, 1.20769)):
        load = StepLoad(num_prefill_tokens=rows, num_attention_pairs=rows * rows)
        whole = sum(cost.stage_time_s(stage, load) for stage in range(4))
        assert whole == pytest.approx(time_s, rel=3e-3)


def test_one_stage_of_four_l20_takes_a_quarter_of_the_measured_time_and_its_all_reduces():
    """Launches, norms and sums are not shared out, so it takes somewhat more than that."""
    hardware = SCENARIOS[0].hardware
    cost, one_stage = pipeline_cost(hardware), pipeline_cost(hardware.as_one_stage())
    for rows in (1, 256, 2048):
        load = StepLoad(num_prefill_tokens=rows, num_attention_pairs=rows * rows)
        whole_s = sum(cost.stage_time_s(stage, load) for stage in range(4))
        # Two rings a layer: 6 transfers of a quarter of the rows, over 25 GB/s in 20 us each.
        ring_s = 6 * (2e-5 + rows * 5120 * 2 / 4 / 25e9)
        time_s = one_stage.stage_time_s(0, load)
        assert 1 <= time_s / (whole_s / 4 + 2 * 64 * ring_s) < 1.15


def test_a_round_trip_is_all_stages_the_hops_between_them_and_the_scheduler():
    hardware = SCENARIOS[0].hardware
    load = StepLoad(num_decodes=10, num_context_tokens=1000)
    stages_s = sum(pipeline_cost(hardware).stage_time_s(stage, load) for stage in range(4))
    hops_s = 3 * (2e-5 + 10 * 5120 * 2 / 25e9)
    assert round_trip_s(hardware, load) == pytest.approx(stages_s + hops_s + 1.5e-3)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_scenario_serves_as_a_pipeline_and_as_one_stage(scenario):
    for hardware in (scenario.hardware, scenario.hardware.as_one_stage()):
        contender = Contender(
            scenario=replace(scenario, hardware=hardware), policy=BalancedConfig()
        )
        case = Case(contender=contender, rate_per_s=None, num_requests=2, seed=0)
        assert simulate(case)["tokens_per_s"] > 0


def test_every_published_comparison_has_a_verdict_and_a_reason_where_it_is_not_reproduced(results):
    rows = json.loads(json.dumps(results["reproduction"]))
    assert len(rows) == len(claims()) + 4 * len(SETUPS)
    for row in rows:
        assert bool(row["why"]) == (row["verdict"] != "reproduced")
    table = policy_table(results | {"scenarios": []})
    assert all(f"| {row['what']} |" in table for row in rows)


def test_the_command_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gllm_ray.bench.command.SCENARIOS", (TINY, SCENARIOS[2]))
    monkeypatch.setattr("gllm_ray.bench.command.Effort", lambda seeds: replace(EFFORT, seeds=seeds))
    path = tmp_path / "policies.json"
    command = ["bench", "policies", "--only", "L20", "--seeds", "7", "--output", str(path)]
    assert main([*command, "--processes", "1"]) == 0
    written = json.loads(path.read_text())
    assert written["seeds"] == [7]
    assert [scenario["name"] for scenario in written["scenarios"]] == [TINY.name]
    assert written["reproduction"] == []
    assert path.with_suffix(".md").read_text() == capsys.readouterr().out


def test_only_what_no_scenario_is_called_is_told_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "policies", "--only", "L21"]) == 1
    assert "--only L21: no scenario's name holds that; there are L20 x 4" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
