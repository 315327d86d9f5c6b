"""A new stage has room for fewer KV blocks than the one that it replaces."""

import asyncio
from dataclasses import replace
from pathlib import Path

import pytest
import ray

from gllm_ray.errors import PipelineError
from gllm_ray.stages import placement
from gllm_ray.stages.actor import StageActor
from tests.faults.replicas import (
    CAUSE,
    RECOVERED,
    logged,
    make_config,
    make_requests,
    running,
    until,
)

pytestmark = pytest.mark.chaos


def shrinking_stage_actor(room: Path):
    """The actor class of stages that have room for as many KV blocks as a file says."""

    class ShrinkingStage(StageActor.__ray_metadata__.modified_class):
        def load(self):
            info = super().load()
            return replace(info, max_kv_blocks=int(room.read_text())) if room.exists() else info

    return ray.remote(
        max_restarts=0, max_task_retries=0, enable_task_events=False, concurrency_groups={"ctl": 2}
    )(ShrinkingStage)


@pytest.fixture
def room(tmp_path, monkeypatch, ray_cluster):
    room = tmp_path / "room"
    monkeypatch.setattr(placement, "StageActor", shrinking_stage_actor(room))
    return room


def test_another_scheduler_goes_on_with_fewer_blocks(room, control_plane, caplog):
    async def scenario():
        async with running(make_config(2, control_plane=control_plane)) as pipeline:
            expected = await pipeline.collect_all(make_requests())
            num_blocks = pipeline.replica.group.num_blocks - 7
            room.write_text(str(num_blocks))
            answers = asyncio.create_task(pipeline.collect_all(make_requests()))
            await pipeline.until_busy(4)
            await pipeline.harm(1)
            assert await answers == expected
            await until(lambda: len(logged(caplog, RECOVERED)) == 2, 30)
            assert pipeline.replica.group.num_blocks == num_blocks
            load = await pipeline.replica.load()
            assert (load.num_requests, load.kv_utilization) == (0, 0)

    asyncio.run(scenario())
    lost, shrunk = logged(caplog, CAUSE)
    assert "stage 1 (layers" in lost
    assert "KV blocks now, and the scheduler counts" in shrunk


async def while_healthy(replica):
    while True:
        await replica.check_health()
        await asyncio.sleep(0.05)


def test_a_stage_without_room_for_one_sequence_is_refused_with_the_reason(
    room, control_plane, caplog
):
    async def scenario():
        config = make_config(2, control_plane=control_plane, max_attempts=1)
        async with running(config) as pipeline:
            room.write_text("3")
            await pipeline.harm(1)
            await until(lambda: logged(caplog, "the repair failed: "), 30)
            with pytest.raises(PipelineError, match=r"^gave up after 2 faults in a row"):
                await while_healthy(pipeline.replica)

    asyncio.run(scenario())
    (reason,) = logged(caplog, "the repair failed: ")
    assert "the KV cache is too small: one sequence of max_model_len=" in reason
