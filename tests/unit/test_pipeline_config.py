"""What follows from the configuration of a pipeline."""

import pytest

from gllm_ray.config import PipelineConfig


@pytest.mark.parametrize(
    ("pipeline", "crowding"),
    [
        ({"device": "cpu", "num_stages": 2}, 1.2),
        ({"device": "cpu", "num_stages": 1}, 1.0),
        ({"num_stages": 4}, 1.0),
        ({"num_stages": 4, "gpus_per_stage": 0.5}, 2.0),
        ({"num_stages": 2, "gpus_per_stage": 0.25}, 2.0),
        ({"num_stages": 2, "gpus_per_stage": 0.6}, 1.0),
        ({"num_stages": 1, "gpus_per_stage": 0.25}, 1.0),
    ],
)
def test_stages_crowd_a_processor_that_others_of_their_pipeline_have_too(pipeline, crowding):
    assert PipelineConfig(**pipeline).crowding == crowding


@pytest.mark.parametrize(
    ("pipeline", "most"),
    [
        ({"num_stages": 4}, 5),  # a policy may want one ahead
        ({"num_stages": 4, "ring": True}, 6),
        ({"num_stages": 4, "max_in_flight": 2}, 2),
        ({"num_stages": 4, "max_in_flight": 2, "ring": True}, 3),
    ],
)
def test_the_ring_holds_one_more_micro_batch(pipeline, most):
    assert PipelineConfig(**pipeline).most_in_flight == most


def test_what_a_stage_has_of_its_own_goes_before_what_all_stages_have():
    own = [{}, {"accelerator_type": "L4"}, {"resources": {"rack": 2.0}}]
    pipeline = PipelineConfig(
        num_stages=3, accelerator_type="L40S", resources={"room": 1.0}, stages=own
    )
    stages = [pipeline.stage(i) for i in range(3)]
    assert [stage.accelerator_type for stage in stages] == ["L40S", "L4", "L40S"]
    assert [stage.resources for stage in stages] == [{"room": 1.0}, {"room": 1.0}, {"rack": 2.0}]


@pytest.mark.parametrize("transport", ["auto", "nccl", "gloo"])
def test_messages_of_the_stages_own_go_with_any_transport_but_the_object_store(transport):
    direct = {"control_plane": "direct"}
    assert PipelineConfig(activation_transport=transport, **direct).control_plane == "direct"
    with pytest.raises(ValueError, match="'object_store': must be another, or auto"):
        PipelineConfig(activation_transport="object_store", **direct)
