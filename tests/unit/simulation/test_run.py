"""Simulations from a configuration: every key counts, and the same one gives the same result."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from gllm_ray.errors import ConfigError
from gllm_ray.scheduling.load import StepLoad
from gllm_ray.simulation import simulate, simulator
from gllm_ray.simulation.hardware import build_hardware, uncalibrated
from gllm_ray.simulation.simulation_config import load_simulation_config, parse_simulation_config
from tests.unit.simulation.simulations import SMALL, changed

GOLDEN_CONFIG = Path(__file__).with_name("golden.yaml")
GOLDEN_REPORT = Path(__file__).with_name("golden_report.json")
EXAMPLES = sorted((Path(__file__).parents[3] / "configs" / "simulation").glob("*.yaml"))
SLOW_LINK = {"latency_s": 0.01, "bandwidth_bytes_s": 1e9}


def report_of(changes=None, config=SMALL):
    return simulate(changed(changes or {}, config)).report


def flat(value, path=""):
    """Every number and text of nested JSON, by where it stands."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return {key: leaf for k, v in items for key, leaf in flat(v, f"{path}/{k}").items()}
    return {path: value}


def test_the_report_of_a_run_is_the_golden_one():
    report = json.loads(json.dumps(simulate(GOLDEN_CONFIG).report.to_json()))
    expected = flat(json.loads(GOLDEN_REPORT.read_text()))
    assert flat(report).keys() == expected.keys()
    for key, value in flat(report).items():
        is_exact = not isinstance(value, float)
        assert value == (expected[key] if is_exact else pytest.approx(expected[key], rel=1e-9)), key


def test_the_golden_run_has_something_of_everything():
    report = simulate(GOLDEN_CONFIG).report
    assert report.num_ended["length"] > 0
    assert report.num_ended["error"] > 0
    assert report.num_preemptions > 0
    assert 0 < report.goodput_ratio < 1
    assert all(share > 0 for share in report.pipeline.bubble_ratio.values())


def test_two_runs_of_one_configuration_are_equal():
    first, second = (simulate(GOLDEN_CONFIG, keep_intervals=True) for _ in range(2))
    assert first.report == second.report
    assert first.intervals == second.intervals
    assert first.intervals


def test_a_file_a_mapping_and_a_checked_configuration_are_the_same(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    reports = [simulate(each).report for each in (SMALL, path, str(path))]
    assert all(simulate(parse_simulation_config(SMALL)).report == each for each in reports)


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs_and_most_of_its_requests_finish(path):
    config = load_simulation_config(path)
    workload = config.workload.model_copy(update={"num_requests": 40})
    report = simulate(config.model_copy(update={"workload": workload})).report
    assert sum(report.num_ended.values()) == 40
    assert report.num_ended["stop"] + report.num_ended["length"] > 30


BURST = {"arrivals": "at_once", "lengths": {"prompt": 100, "output": 20}, "num_requests": 40}
UNEVEN = {"name": "uniform", "min_tokens": 1, "max_tokens": 200}
PREFIXES = changed({"workload": BURST | {"shared_prefixes": {"count": 2, "tokens": 512}}})
TENANTS = changed(
    {
        "workload": BURST
        | {
            "lengths": {"prompt": UNEVEN, "output": UNEVEN},
            "tenants": [{"name": "a", "share": 9.0}, {"name": "b"}],
        }
    }
)
UNKNOWN_LENGTHS = changed(
    {
        "scheduler": {"policy": "temporal"},
        "kv_cache.num_blocks": 200,
        "workload.arrivals": 50,
        "workload.num_requests": 100,
        "workload.max_tokens": 512,
    }
)
TWO_REPLICAS = changed({"num_replicas": 2, "workload.arrivals": 200})
TP2 = changed({"pipeline.tensor_parallel": 2, "hardware.tensor_parallel_link": "100gbe"})
SCALED = changed(
    {
        "workload.arrivals": {
            "name": "staged",
            "stages": [
                {"duration_s": 0.2, "rate_per_s": 400},
                {"duration_s": 0.5, "rate_per_s": 10},
            ],
        },
        "workload.num_requests": 300,
        "autoscaling": {
            "max_replicas": 3,
            "target_ongoing_requests": 10,
            "upscale_delay_s": 0.02,
            "downscale_delay_s": 0.02,
            "interval_s": 0.01,
            "startup_s": 0.02,
        },
    }
)
OVERLOADED = changed(
    {
        "workload.arrivals": 1500,
        "workload.num_requests": 600,
        "workload.lengths": {"prompt": 100, "output": 1},
        "autoscaling.max_replicas": 8,
        "autoscaling.target_ongoing_requests": 1000,
        "autoscaling.target_queue_time_s": 0.01,
    },
    SCALED,
)


@pytest.mark.parametrize(
    ("changes", "config"),
    [
        ({"model.config.num_hidden_layers": 8}, SMALL),
        ({"hardware.device": "L4"}, SMALL),
        ({"hardware.host": "eager"}, changed({"hardware.device": "H100-80GB-SXM"})),
        ({"hardware.stage_link": SLOW_LINK}, SMALL),
        ({"hardware.nodes": {"num_stages": [1, 1], "link": SLOW_LINK}}, SMALL),
        ({"hardware.tensor_parallel_link": SLOW_LINK}, TP2),
        ({"pipeline.num_stages": 4}, SMALL),
        ({"pipeline.layers": [4, 12]}, SMALL),
        ({"pipeline.max_in_flight": 1}, SMALL),
        ({"pipeline.crowding": 2.0}, changed({"scheduler": {"policy": "balanced"}})),
        ({"pipeline.ring": True}, SMALL),
        ({"kv_cache.block_size": 1024}, SMALL),
        ({"kv_cache.memory_utilization": 0.5}, SMALL),
        ({"kv_cache.num_blocks": 200}, SMALL),
        ({"kv_cache.kv_cache_bytes": "100MiB"}, SMALL),
        ({"scheduler.policy": "temporal"}, SMALL),
        ({"scheduler.max_decodes": 1}, SMALL),
        ({"scheduler.max_waiting_requests": 1}, changed({"workload": BURST})),
        ({"scheduler.queue_timeout_s": 0.01}, changed({"workload": BURST})),
        ({"scheduler.max_waiting_tokens": 100}, changed({"workload": BURST})),
        ({"scheduler.prefix_caching": False}, PREFIXES),
        ({"scheduler.fair_share": True}, TENANTS),
        ({"workload.hint_sigma": 0}, UNKNOWN_LENGTHS),
        ({"cost_model": "learnt"}, changed({"scheduler": {"policy": "balanced"}})),
        ({"timing.schedule_s": 0.01}, SMALL),
        ({"timing.schedule_sequence_s": 0.01}, SMALL),
        ({"timing.dispatch_s": 0.01}, SMALL),
        ({"timing.result_s": 0.01}, SMALL),
        ({"timing.jitter": 0.1}, SMALL),
        ({"timing.is_send_overlapped": False}, changed({"hardware.stage_link": SLOW_LINK})),
        (
            {"timing.slowdowns": [{"stage_id": 1, "start_s": 0, "end_s": 9, "factor": 3}]},
            SMALL,
        ),
        ({"workload.rate_scale": 2.0}, SMALL),
        ({"slo": {"e2e_s": 0.001}}, SMALL),
        ({"num_replicas": 2}, SMALL),
        ({"routing": "round_robin"}, TWO_REPLICAS),
        ({"routing": "prefix_aware"}, changed({"num_replicas": 2}, PREFIXES)),
        ({"autoscaling": ...}, SCALED),
        ({"autoscaling.max_replicas": 2}, SCALED),
        ({"autoscaling.min_replicas": 2, "num_replicas": 2}, SCALED),
        ({"autoscaling.target_ongoing_requests": 4}, SCALED),
        ({"autoscaling.target_queue_time_s": 0.5}, OVERLOADED),
        ({"autoscaling.target_prefill_utilization": 0.5}, OVERLOADED),
        ({"autoscaling.target_kv_utilization": 0.0001}, SCALED),
        ({"autoscaling.max_growth": 1.1}, OVERLOADED),
        ({"autoscaling.upscale_delay_s": 0.1}, SCALED),
        ({"autoscaling.downscale_delay_s": 0.1}, SCALED),
        ({"autoscaling.interval_s": 0.02}, SCALED),
        ({"autoscaling.startup_s": 0.1}, SCALED),
        ({"losses": [{"time_s": 0.5, "recovery_s": 0.1}]}, SMALL),
        ({"seed": 1}, SMALL),
    ],
    ids=lambda value: next(iter(value)),
)
def test_a_key_changes_the_report(changes, config):
    assert report_of(changes, config) != report_of(config=config)


def test_a_sequence_longer_than_max_model_len_is_refused():
    lengths = {"prompt": 100, "output": {"name": "uniform", "min_tokens": 1, "max_tokens": 40}}
    report = report_of({"model.max_model_len": 119, "workload.lengths": lengths})
    assert report.num_ended["error"] > 0
    assert report.num_ended["length"] > 0
    with pytest.raises(ConfigError, match="no time passed: "):
        report_of({"model.max_model_len": 99, "workload": BURST})


def test_the_model_may_be_a_file_a_directory_or_a_mapping(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps(SMALL["model"]["config"] | {"max_position_embeddings": 2048}))
    expected = report_of()
    assert report_of({"model": str(path)}) == expected
    assert report_of({"model": {"path": str(tmp_path)}}) == expected


@pytest.mark.parametrize(
    ("text", "mistake"), [("{", "not JSON"), ("[]", "must hold a JSON object"), (None, "No such")]
)
def test_a_model_file_that_is_none_is_named(tmp_path, text, mistake):
    path = tmp_path / "config.json"
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^model\.path='.*config\.json': .*{mistake}"):
        simulate(changed({"model": {"path": str(path), "max_model_len": 9}}))


def test_without_its_longest_sequence_the_model_needs_max_model_len():
    with pytest.raises(ConfigError, match=r"^model\.max_model_len=null: must be given"):
        simulate(changed({"model.max_model_len": ...}))


@pytest.mark.parametrize("length", [0, -1, True, "2048"])
def test_a_longest_sequence_that_is_none_is_as_none(length):
    changes = {"model.max_model_len": ..., "model.config.max_position_embeddings": length}
    with pytest.raises(ConfigError, match=r"^model\.max_model_len=null: must be given"):
        simulate(changed(changes))


def test_a_model_that_does_not_fit_names_the_stage_and_what_helps():
    layers = {"model.config.num_hidden_layers": 400, "pipeline.layers": [10, 390]}
    with pytest.raises(ConfigError, match=r"^stage 1 of 2: \d+ bytes of weights on each L20"):
        simulate(changed(layers))


def test_a_kv_cache_that_holds_no_sequence_names_the_tightest_stage():
    few = {"kv_cache.num_blocks": 127}
    with pytest.raises(ConfigError, match=r"max_model_len=2048 tokens needs 128 blocks of 16"):
        simulate(changed(few))


def test_a_kv_cache_beyond_the_memory_that_the_weights_leave_is_refused():
    many = {"kv_cache.kv_cache_bytes": "47GiB"}
    with pytest.raises(ConfigError, match=r"kv_cache_bytes=\d+: must be <= \d+, .* of each L20"):
        simulate(changed(many))


def test_kv_blocks_are_those_of_the_tightest_stage():
    config = parse_simulation_config(changed({"pipeline.layers": [4, 12]}))
    hardware = build_hardware(config)
    rooms = [stage.max_kv_blocks for stage in hardware.stages]
    assert hardware.num_blocks == rooms[1] < rooms[0]


def test_a_stage_profile_gives_the_stage_times(tmp_path):
    path = tmp_path / "stages.json"
    load = {"num_decodes": 0, "num_context_tokens": 0, "num_attention_pairs": 0}
    sample = load | {"num_prefill_tokens": 1, "stage_times_s": [0.01, 0.03]}
    profile = {
        "format": "gllm_ray.stage_profile.v1",
        "provenance": "a test",
        "layers": [9, 7],
        "samples": [sample],
    }
    path.write_text(json.dumps(profile))
    one_token = {
        "hardware": {"profile": str(path)},
        "kv_cache.num_blocks": 128,
        "workload": {"arrivals": "at_once", "lengths": {"prompt": 1, "output": 1}},
        "workload.num_requests": 1,
    }
    assert report_of(one_token).ttft_s.mean == pytest.approx(0.04)
    other = {"pipeline.layers": [8, 8]}
    with pytest.raises(ConfigError, match=r"json': .* \[9, 7\] layers; must be of \[8, 8\]"):
        report_of(one_token | other)


def test_prefill_times_are_shared_by_the_layers_of_the_stages(tmp_path):
    path = tmp_path / "prefills.csv"
    path.write_text("Total Length,Execute Time\n1,16\n")
    changes = {"hardware.profile": str(path), "pipeline.layers": [4, 12]}
    cost = build_hardware(parse_simulation_config(changed(changes))).cost
    times_s = [cost.stage_time_s(stage_id, StepLoad(0, 0, 1, 1)) for stage_id in (0, 1)]
    assert times_s == pytest.approx([0.004, 0.012])


def test_a_wrong_profile_is_named(tmp_path):
    path = tmp_path / "stages.json"
    path.write_text("{}")
    changes = {"hardware.profile": str(path)}
    with pytest.raises(ConfigError) as caught:
        simulate(changed(changes))
    assert all(line.startswith("hardware.profile='") for line in str(caught.value).splitlines())


def test_the_scheduler_may_read_its_cost_model(tmp_path):
    path = tmp_path / "cost.json"
    slow = {"rows": [0, 1], "row_times_s": [0.0, 1.0], "tile": 1, "provenance": "a test"}
    path.write_text(json.dumps(slow | {"context_token_s": 0.0, "attention_pair_s": 0.0}))
    balanced = changed({"scheduler": {"policy": {"name": "balanced", "tbt_target_s": 0.5}}})
    changes = {"scheduler.cost_calibration": str(path)}
    assert (
        report_of(changes, balanced).batch_tokens.p99 < report_of(config=balanced).batch_tokens.p99
    )


def test_the_better_clients_know_the_lengths_of_outputs_the_more_of_them_temporal_runs_at_once():
    lengths = {"prompt": 32, "output": {"name": "uniform", "min_tokens": 1, "max_tokens": 400}}
    hidden = {
        "pipeline.num_stages": 1,
        "hardware.stage_link": ...,
        "kv_cache.num_blocks": 256,
        "scheduler": {"policy": "temporal", "length_predictor": "hint"},
        "workload": {"arrivals": "at_once", "lengths": lengths, "num_requests": 200},
        "workload.max_tokens": 1000,
    }
    wall_s = [report_of(hidden | {"workload.hint_sigma": sigma}).wall_s for sigma in (0, 0.5, 2)]
    assert wall_s == sorted(wall_s)
    assert wall_s[2] > 1.2 * wall_s[0]


def test_a_simulation_that_an_autoscaler_would_keep_up_for_ever_ends(monkeypatch):
    monkeypatch.setattr(simulator, "_MAX_LOOKS", 500)
    rare = {"workload.arrivals": 1e-3, "workload.num_requests": 10}
    assert report_of(rare).wall_s > 500 * 5
    with pytest.raises(ConfigError, match=r"interval_s=5: has passed 500 times by 2505 s, and"):
        report_of(rare | {"autoscaling": {"max_replicas": 2}})


def test_a_workload_without_a_request_is_a_mistake():
    with pytest.raises(ConfigError, match="no time passed: "):
        simulate(changed({"workload.num_requests": ..., "workload.duration_s": 1e-9}))


def test_parts_with_nominal_constants_are_named():
    hardware = parse_simulation_config(changed({"hardware.device": "L40S"})).hardware
    assert uncalibrated(hardware) == ["link pcie-4-x16", "device L40S", "host graphs"]
    hardware = parse_simulation_config(changed({"hardware.stage_link": SLOW_LINK})).hardware
    assert uncalibrated(hardware) == ["host graphs"]


def test_the_package_loads_the_simulator_only_when_asked():
    code = (
        "import sys, gllm_ray.simulation as s; names = set(sys.modules); s.simulate; "
        "print('gllm_ray.simulation.run' in names, 'gllm_ray.simulation.run' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert result.stdout == "False True\n"
