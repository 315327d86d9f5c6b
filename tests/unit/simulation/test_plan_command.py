import json
from itertools import product
from math import ceil

import pytest
import yaml

from gllm_ray.cli import main
from gllm_ray.errors import ConfigError
from gllm_ray.partition import size_kv_cache
from gllm_ray.policy_config import BalancedConfig, ChunkedPrefillConfig, TemporalConfig
from gllm_ray.serve_file import load_serve_file, services_of
from gllm_ray.simulation.plan_command import make_plan
from gllm_ray.simulation.plan_evaluation import evaluate, headroom, in_processes, screen
from gllm_ray.simulation.plan_ranking import cost, violations
from gllm_ray.simulation.plan_report import format_plan, memory_table
from gllm_ray.simulation.plan_serve_file import serve_yaml
from gllm_ray.simulation.planner import Choice, Cut, enumerate_choices, stage_infos
from gllm_ray.simulation.workload import Workload
from tests.unit.simulation.plans import TINY, plan


def write(path, config):
    path.write_text(json.dumps(config.model_dump(mode="json")), encoding="utf-8")
    return str(path)


def only_choice(config):
    choices, _ = enumerate_choices(config)
    assert len(choices) == 1
    return choices[0]


def test_a_plan_prints_what_fits_the_frontier_the_best_and_a_file_that_is_valid(capsys, tmp_path):
    serve_file = tmp_path / "serve.yaml"
    arguments = ["--processes", "1", "--output", str(serve_file)]
    assert main(["plan", write(tmp_path / "plan.yaml", plan()), *arguments]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert "Frontier: cost/1M output tokens against p99 E2E" in out
    assert "Best: 1 x (L4, 1 stage x 1 GPU), layers [6], " in out
    assert "Nominal constants, not fitted to measurements: device L4" in out
    assert main(["validate", str(serve_file)]) == 0


def test_the_plan_does_not_depend_on_the_number_of_processes():
    config = plan(search={"stages": [1, 2], "replicas": [1]})
    choices, _ = enumerate_choices(config)
    alone, together = (make_plan(config, choices, num_processes=n) for n in (1, 2))
    assert alone == together
    assert len(alone.outcomes) == len(choices)


def test_results_are_in_the_order_of_the_items_and_progress_counts_up_to_all():
    config, seen = plan(), []
    choices, _ = enumerate_choices(config)
    results = in_processes(
        screen, config, choices, num_processes=1, on_progress=lambda *done: seen.append(done)
    )
    assert [result.choice for result in results] == choices
    assert seen == [(number, len(choices)) for number in range(1, len(choices) + 1)]


@pytest.mark.parametrize(
    ("layers", "num_replicas", "policy"),
    list(
        product(
            [(6,), (2, 4)],
            [1, 3],
            [BalancedConfig(token_budget=1024), ChunkedPrefillConfig(), TemporalConfig()],
        )
    ),
)
def test_the_file_runs_the_stages_layers_replicas_and_policy_of_the_choice(
    tmp_path, layers, num_replicas, policy
):
    cut = Cut(device="L4", tensor_parallel=1, layers=layers)
    choice = Choice(cut=cut, num_replicas=num_replicas, policy=policy)
    config = plan(
        gpus=[{"device": "L4", "count": 8, "link": "pcie-4-x16", "accelerator_type": "L4"}],
        memory_utilization=0.8,
        block_size=32,
        max_decodes=128,
    )
    path = tmp_path / "serve.yaml"
    path.write_text(serve_yaml(config, choice), encoding="utf-8")
    (application,) = load_serve_file(path).applications
    (service,) = services_of(application).values()
    assert service.pipeline.layers == layers
    assert service.pipeline.num_stages == len(layers)
    assert service.pipeline.accelerator_type == "L4"
    assert service.scheduler.policy == policy
    assert service.scheduler.max_decodes == 128
    assert service.kv_cache.block_size == 32
    assert service.kv_cache.memory_utilization == 0.8
    assert service.deployment.min_replicas == service.deployment.max_replicas == num_replicas
    assert service.model.path == "some/model"
    assert service.model.max_model_len == 4096
    assert service.model.dtype == "bfloat16"


@pytest.mark.parametrize("accelerator_type", [None, "L4"])
def test_a_file_that_may_run_on_other_gpus_says_so(capsys, tmp_path, accelerator_type):
    gpus = [
        {"device": "L4", "count": 1, "price_per_hour": 1, "accelerator_type": accelerator_type},
        {"device": "A10G", "count": 1, "price_per_hour": 9},
    ]
    search = {"stages": [1], "replicas": [1], "policies": ["balanced"]}
    path = write(tmp_path / "plan.yaml", plan(gpus=gpus, search=search))
    assert main(["plan", path, "--processes", "1"]) == 0
    errors = capsys.readouterr().err
    assert errors.startswith("L4: the file leaves Ray to take other GPUs") != bool(accelerator_type)


def test_a_replica_of_one_node_is_packed_strictly_and_one_of_several_is_not():
    placements = {}
    for num_stages in (2, 4):
        gpus = [{"device": "L4", "count": 4, "per_node": 2, "link": "pcie-4-x16"}]
        search = {"stages": [num_stages], "replicas": [1]}
        config = plan(gpus=gpus, network="100gbe", search=search)
        file = yaml.safe_load(serve_yaml(config, only_choice(config)))
        pipeline = file["applications"][0]["args"]["pipeline"]
        placements[num_stages] = pipeline["placement_strategy"]
    assert placements == {2: "STRICT_PACK", 4: "PACK"}


def test_the_memory_table_has_the_weights_and_blocks_of_the_engine():
    config = plan(search={"stages": [2], "replicas": [1], "layers": [[2, 4]]})
    choice = only_choice(config)
    infos = stage_infos(config, config.model.shape(), choice.cut)
    num_blocks = size_kv_cache(infos, config.block_size, config.model.max_model_len)
    head, _, *rows = memory_table(config, [choice.cut]).splitlines()
    assert head == (
        f"L4, 2 stages x 1 GPU, layers [2, 4]: {num_blocks} KV blocks, {16 * num_blocks} tokens"
    )
    cells = [row.split() for row in rows]
    assert [row[:3] for row in cells] == [
        [
            str(info.stage_id),
            f"{info.first_layer}-{info.last_layer - 1}",
            f"{info.weight_bytes / 2**20:.1f}",
        ]
        for info in infos
    ]
    assert [int(row[8]) for row in cells] == [info.max_kv_blocks for info in infos]
    assert ["bounds the KV cache" in row for row in rows] == [False, True]


def test_memory_alone_simulates_nothing(capsys, tmp_path):
    path = write(tmp_path / "plan.yaml", plan(search={"stages": [1, 5], "replicas": [1]}))
    assert main(["plan", path, "--memory-only"]) == 0
    out = capsys.readouterr().out
    assert "L4, 5 stages x 1 GPU: needs 5 GPUs, of which there are 4" in out
    assert "KV blocks" in out
    assert "Frontier" not in out


def test_a_file_that_would_not_be_written_is_refused(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "plan.yaml", "--memory-only", "--output", "x"])
    assert "--output: not allowed with argument --memory-only" in capsys.readouterr().err


def test_an_slo_that_cannot_be_met_names_the_limit_and_the_excess(capsys, tmp_path):
    config = plan(slo={"tpot_s": 0.0001}, search={"stages": [1], "replicas": [1]})
    path = write(tmp_path / "plan.yaml", config)
    assert main(["plan", path, "--processes", "1"]) == 1
    out = capsys.readouterr().out
    tpot_s = evaluate(config, only_choice(config)).latency_s["tpot"]
    assert "No choice that the service runs meets the SLO; the nearest one:" in out
    assert f"p99 TPOT {tpot_s:.4g} s > 0.0001 s ({tpot_s / 0.0001:.3g} x)" in out
    assert "applications:" not in out


def test_requests_longer_than_the_model_serves_are_the_reason_that_is_told(capsys, tmp_path):
    short = {"path": "some/model", "config": TINY, "max_model_len": 100}
    config = plan(model=short, search={"stages": [1], "replicas": [1]})
    assert main(["plan", write(tmp_path / "plan.yaml", config), "--processes", "1"]) == 1
    nearest = capsys.readouterr().out.partition("the nearest one:\n")[2].splitlines()[0]
    told, _, reason = nearest.partition(", the first because ")
    assert told.endswith("24 of 24 requests not served")
    assert reason.startswith("prompt (200 tokens)")
    assert reason.endswith("the limit is 100")


def test_tensor_parallelism_is_compared_but_the_file_is_of_what_the_service_runs():
    config = plan(search={"stages": [1], "tensor_parallel": [1, 2], "replicas": [1]})
    choices, _ = enumerate_choices(config)
    result = make_plan(config, choices)
    assert {outcome.choice.cut.tensor_parallel for outcome in result.outcomes} == {1, 2}
    assert result.best.choice.cut.tensor_parallel == 1
    with pytest.raises(ValueError, match="must be 1 GPU a stage"):
        serve_yaml(config, next(c for c in choices if c.cut.tensor_parallel == 2))


def test_without_prices_gpus_are_counted():
    gpus = [{"device": "L4", "count": 4, "link": "pcie-4-x16"}]
    config = plan(gpus=gpus, search={"stages": [1], "replicas": [1, 2]})
    result = make_plan(config, enumerate_choices(config)[0])
    assert result.best.choice.num_gpus == 1
    assert format_plan(config, result).startswith("Frontier: number of GPUs against p99 E2E\n")


def test_choices_that_differ_in_their_layers_are_told_apart():
    config = plan(search={"stages": [2], "replicas": [1], "layers": [[3, 3], [2, 4]]})
    report = format_plan(config, make_plan(config, enumerate_choices(config)[0]))
    rows = report.partition("The best")[2].splitlines()[1:4]
    assert sorted(row[rows[0].index("layers") :][:6] for row in rows) == [
        "[2, 4]",
        "[3, 3]",
        "layers",
    ]


def test_screening_simulates_one_replica_with_its_share_of_the_requests():
    workload = {
        "arrivals": {"name": "gamma", "rate_per_s": 20, "shape": 100},
        "lengths": {"prompt": 100, "output": 20},
        "num_requests": 200,
    }
    config = plan(workload=workload, search={"stages": [1], "replicas": [2]})
    choice = only_choice(config)
    screened, whole = screen(config, choice), evaluate(config, choice)
    assert (screened.num_requests, whole.num_requests) == (100, 200)
    assert screened.output_tokens_per_s == pytest.approx(whole.output_tokens_per_s, rel=0.1)


def test_of_gpus_that_keep_up_the_cheapest_is_best_however_long_it_drains():
    gpus = [
        {"device": "L4", "count": 1, "price_per_hour": 0.8},
        {"device": "L40S", "count": 1, "price_per_hour": 1.1},
    ]
    config = plan(gpus=gpus, search={"stages": [1]})
    result = make_plan(config, enumerate_choices(config)[0])
    assert result.best.choice.cut.device == "L4"
    cheap, dear = (cost(config, outcome) for outcome in result.outcomes)
    assert dear / cheap == pytest.approx(1.1 / 0.8)


def test_a_choice_that_does_not_keep_up_serves_what_it_takes_up():
    lengths = {"prompt": 2000, "output": 20}
    search = {"stages": [1], "replicas": [1]}
    at_rate, at_once = (
        plan(
            workload={"arrivals": arrivals, "lengths": lengths, "num_requests": 300}, search=search
        )
        for arrivals in (200, "at_once")
    )
    served, capacity = (
        evaluate(config, only_choice(config)).output_tokens_per_s for config in (at_rate, at_once)
    )
    assert served == pytest.approx(capacity, rel=0.05)
    assert served < 0.5 * 200 * 20


def test_screening_draws_requests_but_not_their_cost():
    lengths = {"prompt": 100, "output": {"name": "uniform", "min_tokens": 1, "max_tokens": 400}}
    workload = {"arrivals": 8, "lengths": lengths, "num_requests": 40}
    config = plan(workload=workload, search={"stages": [1], "replicas": [4]})
    choice = only_choice(config)
    assert cost(config, screen(config, choice)) == cost(config, evaluate(config, choice))


def test_headroom_raises_the_rate_of_a_burst_and_leaves_its_length():
    def burst(multiple):
        stages = [
            {"duration_s": 1, "rate_per_s": 20 * multiple},
            {"duration_s": 9, "rate_per_s": 0},
        ]
        return plan(
            workload={
                "arrivals": {"name": "staged", "stages": stages},
                "lengths": {"prompt": 1000, "output": 2},
                "duration_s": 10,
            },
            search={"stages": [1], "replicas": [1]},
            slo={"ttft_s": 0.6},
        )

    choice = only_choice(burst(1))
    most = headroom(burst(1), choice)
    octave = max(power for power in (1, 2, 4, 8, 16) if power <= most)
    met, missed = burst(most), burst(most + octave / 8)
    assert not violations(met, evaluate(met, choice))
    assert violations(missed, evaluate(missed, choice))


def test_the_slo_holds_at_the_headroom_and_not_an_eighth_of_its_octave_above():
    workload = {"arrivals": 20, "lengths": {"prompt": 1000, "output": 20}, "num_requests": 60}
    changes = {"workload": workload, "search": {"stages": [1], "replicas": [1]}}
    config = plan(**changes, slo={"ttft_s": 0.2})
    choice = only_choice(config)

    def misses(multiple):
        changes = {"rate_scale": multiple, "num_requests": ceil(60 * multiple)}
        scaled = config.workload.model_copy(update=changes)
        return violations(config, evaluate(config.model_copy(update={"workload": scaled}), choice))

    most = headroom(config, choice)
    assert 1 <= most < 16
    assert not misses(most)
    octave = max(power for power in (1, 2, 4, 8) if power <= most)
    assert misses(most + octave / 8)


def test_no_limit_is_met_at_a_rate_that_is_not_kept_up_with_for_as_long():
    workload = {"arrivals": 20, "lengths": {"prompt": 1000, "output": 20}, "num_requests": 60}
    search = {"stages": [1], "replicas": [1]}
    # In the 3 s of the requests a queue of 1 s forms unless hardly more come than are served.
    config = plan(workload=workload, search=search, slo={"ttft_s": 1})
    whole = evaluate(config, only_choice(config))
    at_once = plan(workload=workload | {"arrivals": "at_once", "num_requests": 300}, search=search)
    served_per_s = evaluate(at_once, only_choice(at_once)).output_tokens_per_s / 20
    assert whole.num_unfinished == 0
    assert headroom(config, only_choice(config)) * 20 < 2 * served_per_s


def test_requests_that_come_at_once_have_no_headroom():
    workload = {"arrivals": "at_once", "lengths": {"prompt": 100, "output": 5}, "num_requests": 9}
    config = plan(workload=workload, search={"stages": [1], "replicas": [1]})
    assert make_plan(config, enumerate_choices(config)[0]).headroom == {}


def test_a_burst_is_screened_at_its_own_time_and_in_its_own_length():
    stages = [{"rate_per_s": 2, "duration_s": 30}, {"rate_per_s": 60, "duration_s": 10}]
    workload = {
        "arrivals": {"name": "staged", "stages": stages},
        "lengths": {"prompt": 1000, "output": 20},
        "duration_s": 40,
    }
    config = plan(workload=workload, search={"stages": [1], "replicas": [4]})
    choice = only_choice(config)
    times = [request.arrival_s for request in Workload(config.workload, 0)]
    shares = [request.arrival_s for request in Workload(config.workload, 0, share=4)]
    assert set(shares) < set(times)
    assert len(shares) == pytest.approx(len(times) / 4, abs=1)
    screened, whole = screen(config, choice), evaluate(config, choice)
    assert screened.latency_s["ttft"] == pytest.approx(whole.latency_s["ttft"], rel=0.5)


def test_a_file_routes_as_the_plan_was_simulated_or_is_refused():
    config = plan(routing="prefix_aware", search={"stages": [1], "replicas": [2]})
    (application,) = yaml.safe_load(serve_yaml(config, only_choice(config)))["applications"]
    assert application["args"]["deployment"]["routing"] == "prefix_aware"
    with pytest.raises(ConfigError, match="routing='random'"):
        plan(routing="random")


@pytest.mark.parametrize(("host", "is_eager"), [("graphs", False), ("eager", True)])
def test_a_file_computes_without_graphs_as_the_plan_was_simulated(tmp_path, host, is_eager):
    config = plan(host=host, search={"stages": [1], "replicas": [1]})
    path = tmp_path / "serve.yaml"
    path.write_text(serve_yaml(config, only_choice(config)), encoding="utf-8")
    (application,) = load_serve_file(path).applications
    (service,) = services_of(application).values()
    assert service.model.enforce_eager == is_eager


def test_mistakes_are_told_and_end_with_a_status(capsys, tmp_path):
    path = tmp_path / "plan.yaml"
    assert main(["plan", str(path)]) == 1
    assert "No such file" in capsys.readouterr().err
    path.write_text("gpus: [", encoding="utf-8")
    assert main(["plan", str(path)]) == 1
    assert str(path) in capsys.readouterr().err
