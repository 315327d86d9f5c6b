import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from gllm_ray.errors import ConfigError
from gllm_ray.partition import size_kv_cache
from gllm_ray.simulation.devices import find_device
from gllm_ray.simulation.model_config import parse_model_shape
from gllm_ray.simulation.plan_config import load_plan_config
from gllm_ray.simulation.plan_ranking import (
    Outcome,
    cost,
    cost_frontier,
    finalists,
    frontier,
    ranked,
    violations,
)
from gllm_ray.simulation.planner import (
    Choice,
    Cut,
    enumerate_choices,
    stage_activations,
    stage_infos,
    stages_per_node,
)
from tests.unit.simulation.configs import FALCON_180B, GPT_2, LLAMA_2_70B, LLAMA_3_8B
from tests.unit.simulation.plans import plan

BALANCED = plan().search.policies[0]


def outcome(num_gpus=1, *, ttft=0.5, tpot=0.05, e2e=2.0, rate=1000.0, unfinished=0, **cut):
    cut = Cut(**{"device": "L4", "tensor_parallel": 1, "layers": (1,) * num_gpus} | cut)
    return Outcome(
        choice=Choice(cut=cut, num_replicas=1, policy=BALANCED),
        latency_s={"ttft": ttft, "tpot": tpot, "e2e": e2e},
        output_tokens_per_s=rate,
        num_requests=10,
        num_unfinished=unfinished,
        utilization=0.5,
    )


def model(config, max_model_len):
    return {"path": "some/model", "config": config, "max_model_len": max_model_len}


def test_the_choices_are_the_product_of_what_is_searched():
    choices, rejections = enumerate_choices(plan())
    assert rejections == []
    found = [(each.cut.num_stages, each.num_replicas, each.policy.name) for each in choices]
    names = ("balanced", "temporal")
    assert found == [(s, r, name) for s in (1, 2) for r in (1, 2) for name in names]


def test_splits_that_come_to_the_same_layers_are_one_choice():
    splits = ["even", [3, 3], [2, 4], [1, 2, 3]]
    choices, _ = enumerate_choices(
        plan(search={"stages": [2, 3], "replicas": [1], "layers": splits})
    )
    assert [each.cut.layers for each in choices] == [(3, 3), (2, 4), (2, 2, 2), (1, 2, 3)]


@pytest.mark.parametrize(("stages", "searched"), [([2], "[2]"), (None, "[1, 2, 4]")])
def test_layers_for_a_depth_that_is_not_searched_are_refused(stages, searched):
    with pytest.raises(ConfigError, match="is for 3 stages") as refusal:
        plan(search={"stages": stages, "layers": ["auto", [1, 2, 3]]})
    assert str(refusal.value).endswith(searched)


@given(st.integers(1000, 400_000))
def test_a_stage_fits_exactly_when_all_that_it_holds_is_within_its_memory(max_model_len):
    attention = 4096 * (4096 + 2 * 1024 + 4096)
    weights = 2 * (32 * (attention + 3 * 4096 * 14336) + 2 * 128256 * 4096)
    kv = -(-max_model_len // 16) * 16 * 2 * 32 * 2 * 1024
    usable = int(0.9 * find_device("L4").memory_bytes)
    config = plan(model=model(LLAMA_3_8B, max_model_len), search={"stages": [1], "replicas": [1]})
    cut = Cut(device="L4", tensor_parallel=1, layers=(32,))
    (activations,) = stage_activations(config, config.model.shape(), cut)
    needed = weights + activations + kv
    choices, rejections = enumerate_choices(config)
    assert bool(choices) == (needed <= usable)
    if rejections:
        (rejection,) = rejections
        assert rejection.what == "L4, 1 stage x 1 GPU, layers [32]"
        assert f"stage 0 needs {needed / 2**30:.2f} GiB on each L4" in rejection.reason
        for part in (f"{weights / 2**30:.2f} GiB of weights", f"{kv / 2**30:.2f} GiB of KV"):
            assert part in rejection.reason
        assert f"available are {usable / 2**30:.2f} GiB, " in rejection.reason


@given(st.sampled_from([LLAMA_3_8B, LLAMA_2_70B]), st.integers(1, 16), st.integers(16, 100_000))
@example(LLAMA_2_70B, 4, 100_000)  # too little by what activations take
def test_what_fits_is_what_the_engine_would_start(config, num_stages, max_model_len):
    gpus = [{"device": "L20", "count": 16, "per_node": 16, "link": "pcie-4-x16"}]
    search = {"stages": [num_stages], "replicas": [1]}
    config = plan(model=model(config, max_model_len), gpus=gpus, search=search)
    shape = config.model.shape()
    choices, rejections = enumerate_choices(config)
    assert len(choices) + len(rejections) == 1
    if choices:
        infos = stage_infos(config, shape, choices[0].cut)
        num_blocks = size_kv_cache(infos, 16, max_model_len)
        assert num_blocks == min(info.max_kv_blocks for info in infos) >= max_model_len / 16
        return
    layers = [int(number) for number in rejections[0].what.partition("[")[2][:-1].split(",")]
    cut = Cut(device="L20", tensor_parallel=1, layers=tuple(layers))
    with pytest.raises(ConfigError):
        size_kv_cache(stage_infos(config, shape, cut), 16, max_model_len)


@pytest.mark.parametrize(
    ("gpu", "network", "search", "reason"),
    [
        ({"count": 1}, None, {"stages": [2]}, "needs 2 GPUs, of which there are 1"),
        ({"link": None}, None, {"stages": [2]}, "gpus.link is null"),
        ({"per_node": 2}, None, {"stages": [4]}, "needs 2 nodes of 2 GPUs; network is null"),
        ({"count": 9}, None, {"stages": [7]}, "pipeline.num_stages=7: the model has 6 layers"),
        (
            {"count": 8, "per_node": 2},
            "100gbe",
            {"stages": [1], "tensor_parallel": [4]},
            "a stage of 4 GPUs would span nodes of 2",
        ),
        (
            {"count": 8},
            None,
            {"stages": [1], "tensor_parallel": [3]},
            "32 attention heads cannot be shared evenly",
        ),
        ({}, None, {"stages": [2], "replicas": [3]}, "4 GPUs, 8 a node, hold 2"),
    ],
)
def test_what_cannot_be_is_told_with_its_reason(gpu, network, search, reason):
    gpus = [{"device": "L4", "count": 4, "link": "pcie-4-x16"} | gpu]
    choices, rejections = enumerate_choices(plan(gpus=gpus, network=network, search=search))
    assert choices == []
    assert [reason in rejection.reason for rejection in rejections] == [True]


@pytest.mark.parametrize("config", [GPT_2 | {"model_type": "gptj"}, FALCON_180B])
def test_a_model_that_the_service_refuses_is_not_planned_for(config):
    with pytest.raises(ConfigError, match=f"'{config['model_type']}' cannot be planned for"):
        enumerate_choices(plan(model=model(config, 16)))


@pytest.mark.parametrize(
    "changes", [{"network": "pigeon"}, {"gpus": [{"device": "L4", "count": 1, "link": "pigeon"}]}]
)
def test_a_link_is_known_even_if_no_choice_takes_it(changes):
    with pytest.raises(ConfigError, match="pigeon"):
        enumerate_choices(plan(**changes))


@pytest.mark.parametrize(
    ("count", "per_node", "num_stages", "num_replicas"),
    [(16, 8, 3, 4), (12, 8, 4, 3), (12, 8, 6, 1), (6, 4, 6, 1), (8, 4, 6, 1), (14, 4, 6, 2)],
)
def test_replicas_share_a_node_or_have_nodes_of_their_own(
    count, per_node, num_stages, num_replicas
):
    gpus = [{"device": "L4", "count": count, "per_node": per_node, "link": "pcie-4-x16"}]
    choices, _ = enumerate_choices(
        plan(gpus=gpus, network="100gbe", search={"stages": [num_stages]})
    )
    assert [each.num_replicas for each in choices] == list(range(1, num_replicas + 1))


def test_stages_fill_one_node_after_the_other():
    gpu = plan(gpus=[{"device": "L4", "count": 16, "per_node": 4}]).gpus[0]
    assert stages_per_node(gpu, 10, 1) == (4, 4, 2)
    assert stages_per_node(gpu, 4, 2) == (2, 2)


def test_the_cost_is_the_price_of_the_gpus_over_the_tokens_of_an_hour():
    assert cost(plan(), outcome(4, rate=1000.0)) == pytest.approx(4 * 0.5 / 3.6)
    unpriced = plan(gpus=[{"device": "L4", "count": 4, "link": "pcie-4-x16"}])
    assert cost(unpriced, outcome(4)) == 4


points = st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=30)


@given(points)
def test_no_point_of_the_frontier_is_dominated_and_every_other_point_is(values):
    kept = frontier(values, lambda point: point[0], lambda point: point[1])

    def dominates(a, b):
        return a != b and a[0] <= b[0] and a[1] <= b[1]

    assert not any(dominates(a, b) for a in values for b in kept)
    assert all(any(dominates(a, b) for a in kept) for b in values if b not in kept)
    assert kept == sorted(set(kept))


def test_a_choice_that_refuses_requests_is_not_on_the_frontier():
    refusing, serving = outcome(1, unfinished=1), outcome(2)
    assert cost_frontier(plan(), [refusing, serving]) == [serving]


def test_the_cheapest_that_meets_the_slo_comes_first_and_the_worst_excess_last():
    cheap, dear, slow = outcome(1), outcome(4), outcome(1, ttft=1.5)
    slower, refusing = outcome(1, tpot=0.3), outcome(1, unfinished=1)
    assert ranked(plan(), [refusing, slower, slow, dear, cheap]) == [
        cheap,
        dear,
        slow,
        slower,
        refusing,
    ]


def test_an_slo_that_is_missed_says_which_limit_and_by_how_much():
    assert violations(plan(), outcome()) == []
    assert violations(plan(), outcome(ttft=3.0, tpot=0.15, unfinished=2)) == [
        "p99 TTFT 3 s > 1 s (3 x)",
        "p99 TPOT 0.15 s > 0.1 s (1.5 x)",
        "2 of 10 requests not served",
    ]


def test_the_finalists_are_the_best_the_service_runs_the_best_of_all_and_the_frontier():
    config = plan(search={"num_finalists": 1})
    shared = outcome(1, rate=9000.0, layers=(6,), tensor_parallel=2)
    served, middle, fast = outcome(2), outcome(3, e2e=3.0), outcome(4, e2e=0.1)
    picked = finalists(config, [fast, middle, shared, served])
    assert picked == [served.choice, shared.choice, fast.choice]


def test_the_example_is_a_plan(request):
    path = request.config.rootpath / "configs" / "plans" / "llama70b.yaml"
    choices, _ = enumerate_choices(load_plan_config(path))
    assert {each.cut.device for each in choices} == {"L40S", "A100-80GB-SXM"}


def test_mistakes_name_the_key_and_the_file(tmp_path):
    path = tmp_path / "plan.yaml"
    path.write_text("model: {path: a, max_model_len: 0}\ngpus: []\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="max_model_len=0: must be an integer >= 1") as caught:
        load_plan_config(path)
    assert all(line.startswith(f"{path}: ") for line in str(caught.value).splitlines())
    gpus = [{"device": "L4", "count": 1, "price_per_hour": 1.0}, {"device": "A10G", "count": 1}]
    with pytest.raises(ConfigError, match="price_per_hour=null: must be given for all"):
        plan(gpus=gpus)


def test_the_shape_is_read_from_a_config_json_beside_the_plan(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B), encoding="utf-8")
    values = plan(model=model("config.json", 4096)).model_dump(mode="json")
    (tmp_path / "plan.yaml").write_text(json.dumps(values), encoding="utf-8")
    config = load_plan_config(tmp_path / "plan.yaml")
    assert config.model.shape() == parse_model_shape(LLAMA_3_8B)


def test_more_choices_than_can_be_screened_are_refused():
    gpus = [{"device": "L4", "count": 10_000, "price_per_hour": 0.5, "link": "pcie-4-x16"}]
    with pytest.raises(ConfigError, match=r"^15000 choices .* at most 10000 .*search\.replicas"):
        enumerate_choices(plan(gpus=gpus, search={"stages": [1, 2]}))
