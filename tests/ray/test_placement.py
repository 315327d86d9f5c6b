from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.bundles import bundles
from gllm_ray.config import kv_cache_of, parse_service_config
from gllm_ray.stages.placement import order_by_node
from tests.pipelines import make_service_config


def test_a_stage_on_cpu_reserves_its_cpus_after_the_bundle_of_replica_and_scheduler() -> None:
    config = make_service_config(Path("m"), num_stages=2, cpus_per_stage=1.5)
    owner, *stages = bundles(config)
    assert list(owner) == ["CPU"]
    assert 0 < owner["CPU"] < 1
    assert stages == [{"CPU": 1.5}, {"CPU": 1.5}]


def test_a_stage_on_a_gpu_reserves_its_share_of_the_wanted_type() -> None:
    config = make_service_config(
        Path("m"), num_stages=3, device="cuda", gpus_per_stage=0.5, accelerator_type="L40S"
    )
    stage = {"CPU": 1.0, "GPU": 0.5, "accelerator_type:L40S": 0.001}
    assert bundles(config)[1:] == [stage] * 3


def test_stages_on_unlike_gpus_reserve_each_their_type_and_resources() -> None:
    config = make_service_config(
        Path("m"),
        num_stages=2,
        device="cuda",
        accelerator_type="L40S",
        resources={"rack_a": 0.5},
        stages=[{}, {"accelerator_type": "A100", "resources": {"rack_b": 0.25}}],
    )
    gpu = {"CPU": 1.0, "GPU": 1.0}
    assert bundles(config)[1:] == [
        gpu | {"accelerator_type:L40S": 0.001, "rack_a": 0.5},
        gpu | {"accelerator_type:A100": 0.001, "rack_b": 0.25},
    ]


@pytest.mark.parametrize(
    ("kv_cache", "stages", "expected"),
    [
        ({}, [], [(0.9, None)] * 2),
        ({}, [{}, {"memory_utilization": 0.5}], [(0.9, None), (0.5, None)]),
        ({}, [{"kv_cache_bytes": 4096}, {}], [(0.9, 4096), (0.9, None)]),
        (
            {"kv_cache_bytes": 8192},
            [{"memory_utilization": 0.5}, {"kv_cache_bytes": 4096}],
            [(0.5, None), (0.9, 4096)],
        ),
    ],
)
def test_what_a_stage_says_of_its_memory_goes_before_what_all_have(
    kv_cache, stages, expected
) -> None:
    config = parse_service_config(
        {
            "model": {"path": "m"},
            "pipeline": {"num_stages": 2, "stages": stages},
            "kv_cache": kv_cache,
        }
    )
    found = [kv_cache_of(config, stage_id) for stage_id in range(2)]
    assert [(each.memory_utilization, each.kv_cache_bytes) for each in found] == expected


layouts = st.lists(st.tuples(st.sampled_from(["L4", "A100"]), st.sampled_from("abc")), max_size=24)


@given(layouts)
def test_every_bundle_gets_one_stage_and_every_stage_a_bundle_like_its_own(layout) -> None:
    needs = [{"GPU": 1.0, kind: 0.001} for kind, _ in layout]
    order = order_by_node(needs, [node for _, node in layout])
    assert sorted(order) == list(range(len(layout)))
    assert [needs[i] for i in order] == needs


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=64))
def test_stages_that_are_alike_leave_each_node_once(nodes) -> None:
    placed = [nodes[i] for i in order_by_node([{"GPU": 1.0}] * len(nodes), nodes)]
    num_moves = sum(one != other for one, other in pairwise(placed))
    assert num_moves == len(set(nodes)) - 1
