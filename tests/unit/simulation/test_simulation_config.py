"""The schema of configs/simulation/*.yaml: what is a mistake, and how it is told."""

import re
from pathlib import Path

import pytest
import yaml

from gllm_ray.cli import main
from gllm_ray.config import SchedulerConfig
from gllm_ray.errors import ConfigError
from gllm_ray.simulation.simulation_config import (
    SimulationConfig,
    load_simulation_config,
    parse_simulation_config,
)
from gllm_ray.strict_schema import key_table
from tests.unit.simulation.simulations import SMALL, changed

EXAMPLES = sorted((Path(__file__).parents[3] / "configs" / "simulation").glob("*.yaml"))
PROFILED = {"hardware": {"profile": "stages.json"}, "kv_cache.num_blocks": 1000}
TWO_NODES = {"hardware.nodes": {"num_stages": [1, 1], "link": "100gbe"}}


def mistakes_of(changes):
    with pytest.raises(ConfigError) as caught:
        parse_simulation_config(changed(changes))
    return str(caught.value).splitlines()


def test_there_are_examples():
    assert len(EXAMPLES) >= 5


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_has_no_mistake_and_names_files_that_are_there(path):
    config = load_simulation_config(path)
    assert config.model.path is None or Path(config.model.path).is_file()


def test_the_scheduler_is_that_of_the_service():
    config = parse_simulation_config(changed({"scheduler": {"policy": "balanced"}}))
    assert config.scheduler == SchedulerConfig.model_validate({"policy": "balanced"})
    assert parse_simulation_config(SMALL).scheduler == SchedulerConfig()


@pytest.mark.parametrize(
    ("changes", "mistake"),
    [
        ({"timing.jitter": 1000}, "timing.jitter=1000: must be a number from 0 to 10"),
        (
            {
                "workload.lengths.prompt": {
                    "name": "lognormal",
                    "median_tokens": 9,
                    "sigma": 1000,
                    "max_tokens": 99,
                }
            },
            "workload.lengths.prompt.sigma=1000: must be a number from 0 to 10",
        ),
        ({"hardware.device": "L2"}, "hardware.device='L2': must be one of A100-80GB-PCIe, "),
        ({"hardware.host": "x"}, "hardware.host='x': must be one of graphs, eager"),
        (
            {"hardware.stage_link": "usb"},
            "hardware.stage_link='usb': must be a mapping of latency_s and bandwidth_bytes_s, or ",
        ),
        (
            {"hardware.stage_link": {"latency_s": 0.1}},
            "hardware.stage_link.bandwidth_bytes_s=null: must be given for a link without a name",
        ),
        (
            {"hardware.stage_link": {"name": "100gbe", "latency_s": 0.1}},
            "hardware.stage_link.latency_s=0.1: must be left out when name is given",
        ),
        (
            {"hardware.stage_link": {"latency_s": 0, "bandwidth_bytes_s": 0}},
            "hardware.stage_link.bandwidth_bytes_s=0: must be a number > 0, or null",
        ),
        ({"hardware.device": ...}, "hardware.device=null: must be given when profile is not"),
        (
            TWO_NODES | {"hardware.stage_link": ...},
            "hardware.stage_link=null: must be given when nodes is",
        ),
        (
            {"hardware.nodes": {"num_stages": [2, 1], "link": "100gbe"}},
            "hardware.nodes.num_stages=[2, 1]: must add up to pipeline.num_stages=2",
        ),
        ({"hardware.profile": "x.txt"}, "hardware.profile='x.txt': must end in .json or .csv"),
        (
            {"hardware": {"profile": "x.csv"}},
            "hardware.device=null: must be given when profile is a .csv",
        ),
        (
            PROFILED | {"hardware.host": "eager"},
            "hardware.host='eager': must be left out when profile is given",
        ),
        (
            PROFILED | {"hardware.tensor_parallel_link": "100gbe"},
            "hardware.tensor_parallel_link={...}: must be left out when profile is given",
        ),
        (
            PROFILED | {"kv_cache.num_blocks": ...},
            "kv_cache.num_blocks=null: must be given, or kv_cache_bytes, without a device",
        ),
        (
            PROFILED | {"pipeline.tensor_parallel": 2},
            "pipeline.tensor_parallel=2: must be 1 when hardware.profile is given, which tells",
        ),
        (
            {"pipeline.tensor_parallel": 2},
            "hardware.tensor_parallel_link=null: must be given when tensor_parallel is 2",
        ),
        (
            {"hardware.tensor_parallel_link": "100gbe"},
            "hardware.tensor_parallel_link={...}: must be left out when tensor_parallel is 1",
        ),
        (
            {"pipeline.num_stages": 1},
            "hardware.stage_link={...}: must be left out when num_stages is 1",
        ),
        (
            {"pipeline.layers": [16]},
            "pipeline.layers=[16]: must list num_stages=2 stages, not 1",
        ),
        ({"model.path": "x"}, "model.path='x': must be left out when config is given"),
        ({"model": {}}, "model.path=null: must be given when config is not"),
        (
            {"kv_cache": {"num_blocks": 9, "kv_cache_bytes": 99}},
            "kv_cache.kv_cache_bytes=99: must be left out when num_blocks is given",
        ),
        ({"scheduler.length_log": "x"}, "scheduler.length_log='x': must be null in a simulation"),
        (
            {"scheduler.length_predictor": {"name": "classifier", "path": "x"}},
            "scheduler.length_predictor.name='classifier': must be statistics or hint in a sim",
        ),
        (
            {"scheduler.length_predictor": "hint"},
            "workload.hint_sigma=null: must be given when scheduler.length_predictor is hint",
        ),
        (
            {
                "scheduler.length_predictor": "hint",
                "workload": {"name": "trace", "path": "without hints.csv"},
            },
            "workload.hint_sigma=null: must be given when scheduler.length_predictor is hint",
        ),
        (
            {"scheduler.cost_calibration": "x", "cost_model": "learnt"},
            "cost_model='learnt': must be left out when scheduler.cost_calibration is given",
        ),
        (
            {"timing.slowdowns": [{"stage_id": 2, "start_s": 0, "end_s": 1, "factor": 2}]},
            "timing.slowdowns[0].stage_id=2: must be < pipeline.num_stages=2",
        ),
        (
            {"timing.slowdowns": [{"stage_id": 0, "start_s": 1, "end_s": 1, "factor": 2}]},
            "timing.slowdowns[0].end_s=1: must be > start_s=1",
        ),
        (
            {"losses": [{"time_s": 1, "replica_id": 1}]},
            "losses[0].replica_id=1: must be < num_replicas=1",
        ),
        (
            {"num_replicas": 4, "autoscaling": {"max_replicas": 3}},
            "num_replicas=4: must be from autoscaling.min_replicas=1 to max_replicas=3",
        ),
        (
            {"autoscaling": {"min_replicas": 3, "max_replicas": 2}},
            "autoscaling.min_replicas=3: must be <= max_replicas=2",
        ),
        (
            {"routing": "sticky"},
            "routing='sticky': must be round_robin, random, least_outstanding, power_of_two or ",
        ),
        ({"workload.arrivals": 0}, "workload.arrivals=0: must be a rate from 1e-06"),
        ({"num_replicas": 10**6}, "num_replicas=1000000: must be an integer from 1 to 10000"),
        (
            {"autoscaling": {"max_replicas": 10**6}},
            "autoscaling.max_replicas=1000000: must be an integer from 1 to 10000",
        ),
        ({"workload": ...}, "workload: required, but not given"),
        ({"slo": {"ttft": 1}}, "slo.ttft=1: unknown key; did you mean ttft_s?"),
        ({"scheduler.polcy": "x"}, "scheduler.polcy='x': unknown key; did you mean policy?"),
        ({"seed": 1.5}, "seed=1.5: must be an integer"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_value_and_limit(changes, mistake):
    (line,) = mistakes_of(changes)
    assert line.startswith(mistake)


def test_each_of_several_mistakes_has_its_line():
    changes = {"hardware.device": "L2", "timing.jitter": -1, "pipeline.num_stages": 0}
    assert [line.partition("=")[0] for line in mistakes_of(changes)] == [
        "hardware.device",
        "pipeline.num_stages",
        "timing.jitter",
    ]


def test_a_mistake_in_a_file_begins_with_its_name(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(changed({"hardware.device": 1, "seed": "x"})))
    with pytest.raises(ConfigError) as caught:
        load_simulation_config(path)
    assert [line.partition("=")[0] for line in str(caught.value).splitlines()] == [
        f"{path}: hardware.device",
        f"{path}: seed",
    ]


def test_a_key_given_twice_is_a_mistake_with_its_line(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("seed: 1\nseed: 2\n")
    with pytest.raises(ConfigError, match=r"twice\.yaml:2: key 'seed' is given twice"):
        load_simulation_config(path)


def test_paths_are_relative_to_the_file_that_names_them(tmp_path):
    path = tmp_path / "paths.yaml"
    config = changed(
        {
            "model": "model",
            "hardware.profile": "times.csv",
            "scheduler.cost_calibration": "cost.json",
            "workload": {"name": "trace", "path": "/traces/a.csv"},
        }
    )
    path.write_text(yaml.safe_dump(config))
    loaded = load_simulation_config(path)
    assert loaded.model.path == str(tmp_path / "model")
    assert loaded.hardware.profile == str(tmp_path / "times.csv")
    assert loaded.scheduler.cost_calibration == str(tmp_path / "cost.json")
    assert loaded.workload.path == "/traces/a.csv"


def test_every_key_says_what_it_means():
    assert "| `hardware.nodes.num_stages` | required |" in key_table(SimulationConfig)


def test_the_readme_names_every_example():
    text = EXAMPLES[0].with_name("README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\((\S+\.yaml)\)", text)) == {path.name for path in EXAMPLES}


def test_the_documentation_lists_exactly_the_keys_of_the_schema(capsys):
    assert main(["keys", "--simulation"]) == 0
    readme = Path(__file__).parents[3] / "configs" / "simulation" / "README.md"
    assert capsys.readouterr().out in readme.read_text(encoding="utf-8")
