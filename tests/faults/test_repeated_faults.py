"""Stages that die again and again: by themselves, or by a request."""

import asyncio
import os
import re
import signal
import time

import pytest
import ray

from gllm_ray.errors import PipelineError, StageTimeoutError
from gllm_ray.messages import FinishReason
from gllm_ray.stages import placement
from gllm_ray.stages.actor import StageActor
from tests.faults.replicas import CAUSE, logged, make_config, make_request, running
from tests.ray.test_ray_pipeline import stage_processes

POISON = 1000  # the first token of a prompt


class PoisonedStage(StageActor.__ray_metadata__.modified_class):
    """A stage whose process ends when it computes the poison."""

    def load(self):
        info = super().load()
        worker = self._stage._worker
        execute = worker.execute

        def execute_unless_poisoned(batch, *rest):
            if any(POISON in item.token_ids for item in batch.sequences):
                os._exit(1)
            return execute(batch, *rest)

        worker.execute = execute_unless_poisoned
        return info


class HangingStage(StageActor.__ray_metadata__.modified_class):
    """A stage that lives, and never ends a step."""

    def load(self):
        info = super().load()
        self._stage._worker.execute = lambda *_: time.sleep(3600)
        return info


as_actor = ray.remote(
    max_restarts=0, max_task_retries=0, enable_task_events=False, concurrency_groups={"ctl": 2}
)


@pytest.mark.chaos
def test_the_request_that_kills_a_stage_each_time_fails_alone(
    ray_cluster, control_plane, monkeypatch, caplog
):
    innocent = make_request("innocent", max_tokens=10)
    poison = make_request("poison", prompt=(POISON, 1, 2, 3), max_tokens=10)

    async def scenario():
        others = stage_processes(r"\w*Stage")
        async with running(make_config(2, control_plane=control_plane)) as pipeline:
            expected = await pipeline.collect(innocent)
            failed, answer = await pipeline.collect_all([poison, innocent])
            load = await pipeline.replica.load()
            await pipeline.replica.check_health()
            assert stage_processes(r"\w*Stage") - others == set(await pipeline.pids())
        return expected, answer, failed, load

    monkeypatch.setattr(placement, "StageActor", as_actor(PoisonedStage))
    expected, answer, failed, load = asyncio.run(scenario())
    assert answer == expected
    (event,) = failed
    assert event.finish_reason is FinishReason.BLAMED
    assert event.error.startswith("a stage of the pipeline failed each time it computed")
    assert (load.num_requests, load.kv_utilization) == (0, 0)
    # Together, again, alone, after the other, and alone if that one was still in flight.
    assert len(logged(caplog, CAUSE)) in (4, 5)


@pytest.mark.short_with("refs")
def test_a_stage_that_answers_and_makes_no_progress_is_found_by_the_deadline_of_its_step(
    ray_cluster, control_plane, monkeypatch
):
    async def scenario():
        config = make_config(1, control_plane=control_plane, enabled=False, step_timeout_s=1)
        async with running(config) as pipeline:
            (event,) = await pipeline.collect(make_request("a"))
            with pytest.raises(StageTimeoutError) as caught:
                await pipeline.replica.check_health()
            return event, str(caught.value)

    monkeypatch.setattr(placement, "StageActor", as_actor(HangingStage))
    event, message = asyncio.run(scenario())
    assert event.error == StageTimeoutError.public_message
    assert re.match(r"stage 0 \(layers .*\) hangs: micro-batch 0 of 40 tokens takes 1\.", message)


async def kill_new_stages(spared):
    """Kill every stage process that comes up."""
    while True:
        for pid in stage_processes() - spared:
            os.kill(pid, signal.SIGKILL)
        await asyncio.sleep(0.05)


@pytest.mark.chaos
def test_a_crash_loop_ends_every_request_once_with_its_first_cause(
    ray_cluster, control_plane, caplog
):
    async def scenario():
        others = stage_processes()
        config = make_config(2, control_plane=control_plane, max_attempts=2)
        async with running(config) as pipeline:
            first, _ = await pipeline.pids()
            streams = asyncio.gather(
                *(pipeline.collect(make_request(n, max_tokens=400)) for n in "ab"),
                return_exceptions=True,
            )
            await pipeline.until_busy(2)
            killer = asyncio.create_task(kill_new_stages({first, *others}))
            ends = await streams
            killer.cancel()
            with pytest.raises(PipelineError) as caught:
                await pipeline.replica.check_health()
            assert first in stage_processes()
            return ends, str(caught.value)

    ends, message = asyncio.run(scenario())
    for end in ends:
        assert isinstance(end, PipelineError) or end[-1].finish_reason is FinishReason.ERROR
    assert message.startswith("gave up after 3 faults in a row; the first: stage 1 (layers")
    assert message.count("layers") == 1
    assert len(logged(caplog, CAUSE)) == 1, "a repair that fails tells why itself"
