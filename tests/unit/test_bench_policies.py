import json
from dataclasses import replace

import pytest

from gllm_ray.bench.policies import (
    OURS,
    TTFT_LIMIT_S,
    Effort,
    at_rate,
    bench_policies,
    simulate,
    slo_capacity,
)
from gllm_ray.bench.policy_scenarios import (
    SCENARIOS,
    candidates,
    pipeline_cost,
    tpot_limit_s,
)
from gllm_ray.bench.policy_table import policy_table
from gllm_ray.cli import main
from gllm_ray.policy_config import BalancedConfig, ChunkedPrefillConfig
from gllm_ray.scheduling.load import StepLoad

TINY = replace(SCENARIOS[0], rates_per_s=(4,))
EFFORT = Effort(duration_s=0.5, num_offline=3, seeds=(0, 1), num_bisections=1)


@pytest.fixture(scope="module")
def results():
    return bench_policies([TINY], EFFORT, num_processes=1)


def test_every_policy_is_run_at_every_rate_and_offline(results):
    (scenario,) = results["scenarios"]
    names = list(candidates(1.0))
    cells = [(run["policy"], run["rate_per_s"]) for run in scenario["runs"]]
    assert cells == [(name, rate) for rate in (4, None) for name in names]
    assert list(scenario["slo_capacity_per_s"]) == names


def test_a_cell_is_the_mean_of_its_own_seeds(results):
    cases = [at_rate(TINY, BalancedConfig(), EFFORT, seed, 4) for seed in EFFORT.seeds]
    values = [simulate(case)["tokens_per_s"] for case in cases]
    (cell,) = [
        run
        for run in results["scenarios"][0]["runs"]
        if (run["policy"], run["rate_per_s"]) == (OURS, 4)
    ]
    assert values[0] != values[1]
    assert cell["tokens_per_s"] == pytest.approx(sum(values) / 2)


def test_the_table_names_every_policy_and_says_which_goals_are_missed(results):
    table = policy_table(json.loads(json.dumps(results)))
    for name in candidates(1.0):
        assert table.count(f"| {name} |") == 2
    changed = json.loads(json.dumps(results))
    for run in changed["scenarios"][0]["runs"]:
        if run["policy"] == OURS:
            run |= {"tokens_per_s": 10**6, "utilization": 1.0, "ideal_ratio": 1.0}
            run |= {"ttft_p90_s": 0.0, "tpot_p99_s": 0.0}
    changed["scenarios"][0]["slo_capacity_per_s"][OURS] = 10**6
    assert "missed" in table
    assert "missed" not in policy_table(changed)


def test_the_slo_holds_at_the_capacity_and_not_2_percent_above():
    scenario = replace(SCENARIOS[0], rates_per_s=(8, 48))
    policy, effort = ChunkedPrefillConfig(token_budget=1024), Effort(duration_s=4)
    rate = slo_capacity(scenario, policy, effort, seed=0)
    limit_s = tpot_limit_s(scenario.hardware)

    def is_met(rate_per_s):
        measures = simulate(at_rate(scenario, policy, effort, 0, rate_per_s))
        return measures["ttft_p90_s"] <= TTFT_LIMIT_S and measures["tpot_p99_s"] <= limit_s

    assert 4 < rate < 96
    assert is_met(rate)
    assert not is_met(rate * (96 / 4) ** (1 / 2**7))


def test_measured_prefills_are_met_by_the_cost_of_the_l20():
    cost = pipeline_cost(SCENARIOS[0].hardware)
    for rows, time_s in ((1, 0.08551), (256, 0.15587), (2048, 1.20769)):
        load = StepLoad(num_prefill_tokens=rows, num_attention_pairs=rows * rows)
        whole = sum(cost.stage_time_s(stage, load) for stage in range(4))
        assert whole == pytest.approx(time_s, rel=3e-3)


@pytest.mark.parametrize("scenario", SCENARIOS, ids=lambda scenario: scenario.name)
def test_every_scenario_serves(scenario):
    effort = Effort(duration_s=1)
    measures = simulate(at_rate(scenario, BalancedConfig(), effort, 0, scenario.rates_per_s[0]))
    assert measures["tokens_per_s"] > 0


def test_the_command_writes_json_and_markdown(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("gllm_ray.bench.command.SCENARIOS", (TINY, SCENARIOS[2]))
    monkeypatch.setattr("gllm_ray.bench.command.Effort", lambda seeds: replace(EFFORT, seeds=seeds))
    path = tmp_path / "results" / "policies.json"
    command = ["bench", "policies", "--only", "L20", "--seeds", "7", "--output", str(path)]
    assert main([*command, "--processes", "1"]) == 0
    written = json.loads(path.read_text())
    assert written["seeds"] == [7]
    assert [scenario["name"] for scenario in written["scenarios"]] == [TINY.name]
    assert path.with_suffix(".md").read_text() == capsys.readouterr().out
