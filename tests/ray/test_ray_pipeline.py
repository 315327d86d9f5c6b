"""What only a pipeline of Ray actors can do, or suffer."""

import asyncio
import itertools
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import torch
from ray.actor import ActorMethod
from ray.util.placement_group import PlacementGroup, placement_group, remove_placement_group

from gllm_ray.bundles import bundles
from gllm_ray.config import ServiceConfig
from gllm_ray.errors import ConfigError, PipelineError, StageLostError
from gllm_ray.messages import SamplingParams, StepInterval
from gllm_ray.stages import ref_chain
from gllm_ray.stages.metadata import MetadataEncoder
from gllm_ray.stages.ray_pipeline import RayPipeline
from gllm_ray.stages.ref_chain import RefChain
from gllm_ray.stages.stage_group import StageGroup, start_stage_group
from tests.pipelines import (
    RayStages,
    Reference,
    generate_greedily,
    make_batch,
    make_service_config,
)
from tests.process_titles import titles

NUM_STAGES = 3
LONG_CHUNK = range(88)  # tokens that keep a stage busy for some milliseconds


@pytest.fixture(scope="module", params=["refs", "direct"])
def config(tiny_llama: Path, request: pytest.FixtureRequest) -> ServiceConfig:
    return make_service_config(
        tiny_llama, num_stages=NUM_STAGES, cpus_per_stage=2.5, control_plane=request.param
    )


@pytest.fixture(scope="module")
def replica_group(config: ServiceConfig, ray_cluster: None) -> Iterator[PlacementGroup]:
    group = placement_group(bundles(config), strategy=config.pipeline.placement_strategy)
    yield group
    remove_placement_group(group)


@pytest.fixture(scope="module")
def stages(config: ServiceConfig, replica_group: PlacementGroup) -> Iterator[RayStages]:
    stages = RayStages(config, replica_group)
    yield stages
    stages.stop()


def stage_processes(kind: str = "StageActor") -> set[int]:
    """Process ids of all stage actors of this test run's cluster, or those of another kind.

    Args:
        kind: A pattern with which the name of the actors' class begins.
    """
    return {pid for pid, title in titles().items() if re.search(f"ray::{kind}", title)}


def beside_steps(method: ActorMethod) -> ActorMethod:
    """A method of a stage that answers while the stage takes its steps in one long call."""
    return method.options(concurrency_group="ctl")


async def take_results_for_ever(pipeline: RayPipeline) -> None:
    while True:
        await pipeline.next_result()


def test_a_chain_with_inner_stages_generates_what_transformers_generates(
    stages: RayStages, reference: Reference
) -> None:
    async def run() -> list[list[int]]:
        return await generate_greedily(await stages.pipeline(), reference)

    assert asyncio.run(run()) == reference.outputs


def test_each_stage_fills_its_bundle_and_leaves_that_of_the_replica(
    stages: RayStages, replica_group: PlacementGroup
) -> None:
    asyncio.run(stages.pipeline())
    available = ray.available_resources()
    free = [
        available.get(f"CPU_group_{bundle}_{replica_group.id.hex()}", 0.0)
        for bundle in range(1 + NUM_STAGES)
    ]
    assert free == [bundles(stages.config)[0]["CPU"], *[0.0] * NUM_STAGES]


def test_a_stage_on_cpu_has_the_threads_it_reserved(stages: RayStages) -> None:
    def threads(actor: object) -> tuple[int, str, str]:
        return torch.get_num_threads(), os.environ["OMP_NUM_THREADS"], os.environ["OMP_WAIT_POLICY"]

    async def run() -> tuple[int, str, str]:
        await stages.pipeline()
        return await beside_steps(stages.group.stages[0].__ray_call__).remote(threads)

    assert asyncio.run(run()) == (2, "2", "PASSIVE")


def test_stages_compute_different_micro_batches_at_the_same_time(stages: RayStages) -> None:
    num_batches = 20

    async def run() -> list[tuple[StepInterval, ...]]:
        pipeline = await stages.pipeline()
        for batch_id in range(num_batches):
            pipeline.submit(make_batch(batch_id, LONG_CHUNK))
            if batch_id >= NUM_STAGES:
                await pipeline.next_result()
        for _ in range(NUM_STAGES):
            await pipeline.next_result()
        calls = (stage.intervals.remote() for stage in stages.group.stages)
        return [intervals[-num_batches:] for intervals in await asyncio.gather(*calls)]

    for upstream, downstream in itertools.pairwise(asyncio.run(run())):
        assert [step.batch_id for step in downstream] == list(range(num_batches))
        overlapped = {
            step.batch_id
            for step, other in itertools.product(downstream, upstream)
            if other.batch_id > step.batch_id
            and min(step.end_s, other.end_s) > max(step.start_s, other.start_s)
        }
        assert overlapped  # of many, since what else runs here decides how many


@pytest.mark.parametrize("epochs_off", [-1, 1])
def test_a_step_of_another_epoch_is_refused_and_harms_nothing(
    stages: RayStages, reference: Reference, epochs_off: int
) -> None:
    async def run() -> list[list[int]]:
        pipeline = await stages.pipeline()
        epoch, stage = stages.group.epoch + epochs_off, stages.group.stages[0]
        metadata = MetadataEncoder().encode(make_batch(0, [1]))
        for call in (
            beside_steps(stage.step).remote(epoch, metadata, None),
            beside_steps(stage.run).remote(epoch, []),
        ):
            with pytest.raises(PipelineError, match=f"refuses a micro-batch of epoch {epoch}"):
                await call
        return await generate_greedily(pipeline, reference)

    assert asyncio.run(run()) == reference.outputs


def test_who_has_left_its_edges_refuses_steps_until_it_is_connected_anew(
    stages: RayStages, reference: Reference
) -> None:
    async def run() -> list[list[int]]:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(0, LONG_CHUNK))
        await stages.group.stages[1].leave_edges.remote()
        pipeline.submit(make_batch(1, [1]))
        with pytest.raises(PipelineError, match="stage 1 refuses a micro-batch of epoch"):
            await take_results_for_ever(pipeline)
        return await generate_greedily(await stages.pipeline(), reference)

    assert asyncio.run(run()) == reference.outputs


def test_a_micro_batch_out_of_order_breaks_the_pipeline(stages: RayStages) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(1, [1]))
        pipeline.submit(make_batch(0, [2]))
        assert (await pipeline.next_result()).batch_id == 1
        with pytest.raises(PipelineError, match="micro-batch 0 after 1"):
            await pipeline.next_result()

    asyncio.run(run())


def test_the_error_of_a_step_names_stage_micro_batch_and_cause_in_one_line(
    stages: RayStages,
) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(7, [5], sampling=SamplingParams(temperature=1.0, seed="x")))
        with pytest.raises(PipelineError) as failure:
            await pipeline.next_result()
        assert type(failure.value) is PipelineError
        expected = f"stage {NUM_STAGES - 1} failed to run micro-batch 7: TypeError: "
        assert str(failure.value).startswith(expected)
        assert len(str(failure.value).splitlines()) == 1

    asyncio.run(run())


def test_a_failure_comes_after_the_answers_before_it_however_long_these_take(
    stages: RayStages,
) -> None:
    def slow_down(actor: Any) -> None:
        execute = actor._stage._worker.execute
        actor._stage._worker.execute = lambda *args: (time.sleep(1.5), execute(*args))[1]

    def hurry(actor: Any) -> None:
        del actor._stage._worker.execute

    async def run() -> None:
        pipeline = await stages.pipeline()
        last = beside_steps(stages.group.stages[-1].__ray_call__)
        await last.remote(slow_down)
        for batch_id in (1, 2, 0):
            pipeline.submit(make_batch(batch_id, [5]))
        assert [(await pipeline.next_result()).batch_id for _ in range(2)] == [1, 2]
        with pytest.raises(PipelineError, match="stage 0 got micro-batch 0 after 2"):
            await pipeline.next_result()
        await last.remote(hurry)

    asyncio.run(run())


def test_stages_before_the_one_that_failed_do_not_wait_for_it(stages: RayStages) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(0, [5], sampling=SamplingParams(temperature=1.0, seed="x")))
        for batch_id in range(1, 40):
            pipeline.submit(make_batch(batch_id, [5]))
        with pytest.raises(PipelineError):
            await pipeline.next_result()
        async with asyncio.timeout(5):
            await stages.pipeline()

    asyncio.run(run())


@pytest.mark.parametrize(
    ("model", "message"),
    [("missing", r"^model\.path="), ("too few layers listed", r"^stage 0 on \d+\.[\d.]+: \w")],
)
def test_a_model_that_cannot_be_served_is_refused_and_leaves_no_actor(
    ray_cluster: None, tiny_llama: Path, model: str, message: str
) -> None:
    if model == "missing":
        config = make_service_config(tiny_llama / "missing", cpus_per_stage=0.1)
    else:
        config = make_service_config(tiny_llama, layers=[3], cpus_per_stage=0.1)
    others = stage_processes()
    with pytest.raises(ConfigError, match=message):
        asyncio.run(start_stage_group(config))
    deadline = time.monotonic() + 5
    while stage_processes() - others:
        assert time.monotonic() < deadline
        time.sleep(0.05)


@ray.remote(num_cpus=0)
class SlowStage:
    def step(self, epoch: int, metadata: bytes, previous: object) -> str:
        time.sleep(0.5)
        return "late"


def test_an_answer_that_comes_when_its_chain_has_ended_is_an_answer(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ref_chain, "_DRAIN_TIMEOUT_S", 0.05)

    async def run() -> object:
        stages = (SlowStage.remote(),)
        group = StageGroup(stages=stages, infos=(), num_blocks=1, max_model_len=1, epoch=0)
        chain = RefChain(group)
        chain.submit(make_batch(7, [1]))
        answer = asyncio.create_task(chain.next_answer())
        await asyncio.sleep(0)
        assert await chain.end() == []
        assert chain.oldest is None
        return await answer

    assert asyncio.run(run()) == (7, "late")


@pytest.mark.parametrize("stage_id", range(NUM_STAGES))
def test_a_killed_stage_is_named_within_two_seconds(
    stages: RayStages, reference: Reference, stage_id: int
) -> None:
    async def run() -> float:
        pipeline = await stages.pipeline()
        # After the first kill this is a pipeline with a replaced stage.
        assert await generate_greedily(pipeline, reference) == reference.outputs
        pid = await stages.group.stages[stage_id].ping.remote()
        for batch_id in range(1000, 1030):
            pipeline.submit(make_batch(batch_id, LONG_CHUNK))
        await pipeline.next_result()
        os.kill(pid, signal.SIGKILL)
        killed = time.monotonic()
        with pytest.raises(StageLostError, match=f"^stage {stage_id} .* was lost: .*died"):
            await take_results_for_ever(pipeline)
        return time.monotonic() - killed

    assert asyncio.run(run()) < 2
