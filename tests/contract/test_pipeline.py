"""What every `Pipeline` promises, whether its stages share a process or are Ray actors."""

import asyncio
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gllm_ray.config import ServiceConfig
from gllm_ray.errors import PipelineError
from gllm_ray.messages import MicroBatch, SamplingParams
from gllm_ray.stages.local_pipeline import LocalPipeline
from tests.pipelines import RayStages, Reference, generate_greedily, make_batch, make_service_config


class LocalStages:
    def __init__(self, config: ServiceConfig) -> None:
        self.config = config

    async def pipeline(self) -> LocalPipeline:
        return LocalPipeline.start(self.config)

    def stop(self) -> None:
        pass


Stages = LocalStages | RayStages


@pytest.fixture(
    scope="module",
    params=[
        (LocalStages, 1, {}),
        (LocalStages, 2, {}),
        (RayStages, 1, {}),
        (RayStages, 2, {}),
        (RayStages, 2, {"activation_transport": "object_store"}),
        # In flight are at most eight, two chunks of each prompt.
        (RayStages, 1, {"control_plane": "direct", "ring": True, "max_in_flight": 8}),
        (RayStages, 2, {"control_plane": "direct", "ring": True, "max_in_flight": 8}),
    ],
    ids=lambda param: "-".join(map(str, (param[0].__name__, param[1], *param[2].values()))),
)
def stages(request: pytest.FixtureRequest, tiny_llama: Path, ray_cluster: None) -> Iterator[Stages]:
    kind, num_stages, settings = request.param
    config = make_service_config(tiny_llama, num_stages=num_stages, **settings)
    stages = kind(config)
    yield stages
    stages.stop()


def test_results_come_back_in_submit_order_with_their_ids(stages: Stages) -> None:
    async def run() -> list[int]:
        pipeline = await stages.pipeline()
        for batch_id in range(8):
            pipeline.submit(make_batch(batch_id, [batch_id + 1]))
        return [(await pipeline.next_result()).batch_id for _ in range(8)]

    assert asyncio.run(run()) == list(range(8))


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
def test_tokens_equal_those_of_transformers(
    stages: Stages, reference: Reference, *, ring: bool
) -> None:
    async def run() -> list[list[int]]:
        return await generate_greedily(await stages.pipeline(), reference, ring=ring)

    assert asyncio.run(run()) == reference.outputs


def test_a_chunk_that_samples_nothing_returns_no_token(stages: Stages) -> None:
    async def run() -> tuple[int, ...]:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(0, [1, 2, 3], sampling=None))
        return (await pipeline.next_result()).token_ids

    assert asyncio.run(run()) == ()


def test_with_each_result_every_stage_tells_how_long_it_computed(stages: Stages) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        num_stages = stages.config.pipeline.num_stages
        for batch_id in range(4):
            start = time.perf_counter()
            pipeline.submit(make_batch(batch_id, [1, 2, 3]))
            told = (await pipeline.next_result()).stage_times
            wall_s = time.perf_counter() - start
            expected = [(stage_id, batch_id) for stage_id in range(num_stages)]
            assert [(one.stage_id, one.batch_id) for one in told] == expected
            assert min(one.time_s for one in told) > 0
            assert sum(one.time_s for one in told) <= wall_s

    asyncio.run(run())


def test_every_time_comes_with_its_micro_batch_when_several_are_in_flight(stages: Stages) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        num_batches, num_stages = 6, stages.config.pipeline.num_stages
        for batch_id in range(num_batches):
            pipeline.submit(make_batch(batch_id, [1], seq_id=batch_id))
        for batch_id in range(num_batches):
            told = (await pipeline.next_result()).stage_times
            expected = [(stage_id, batch_id) for stage_id in range(num_stages)]
            assert [(one.stage_id, one.batch_id) for one in told] == expected

    asyncio.run(run())


@pytest.mark.parametrize(
    "broken",
    [
        pytest.param(make_batch(2, [10_000]), id="first stage: unknown token"),
        pytest.param(
            make_batch(2, [5], sampling=SamplingParams(temperature=1.0, seed="x")),
            id="last stage: seed of a wrong type",
        ),
    ],
)
def test_an_error_in_a_stage_ends_the_pipeline_after_the_results_before_it(
    stages: Stages, broken: MicroBatch
) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        for batch in (make_batch(0, [1]), make_batch(1, [2]), broken, make_batch(3, [4])):
            pipeline.submit(batch)
        assert [(await pipeline.next_result()).batch_id for _ in range(2)] == [0, 1]
        with pytest.raises(PipelineError):
            await pipeline.next_result()
        pipeline.submit(make_batch(4, [5]))
        depths = []
        for _ in range(3):
            with pytest.raises(PipelineError) as failure:
                await pipeline.next_result()
            depths.append(len(failure.traceback))
        assert len(set(depths)) == 1

    asyncio.run(run())


def test_tokens_that_another_micro_batch_sampled_enter_at_their_places(stages: Stages) -> None:
    prompts = ([1, 2, 3], [7, 6], [9])

    def merge(batches: list[MicroBatch], **fields: Any) -> MicroBatch:
        sequences = tuple(item for batch in batches for item in batch.sequences)
        return replace(batches[0], sequences=sequences, **fields)

    def step(batch_id: int, token_ids: Sequence[int], seq_ids: Sequence[int]) -> MicroBatch:
        return merge(
            [
                make_batch(batch_id, [token], seq_id=seq_id, start=len(prompts[seq_id]))
                for seq_id, token in zip(seq_ids, token_ids, strict=True)
            ]
        )

    async def run() -> tuple[tuple[int, ...], tuple[int, ...]]:
        pipeline = await stages.pipeline()
        pipeline.submit(merge([make_batch(0, p, seq_id=i) for i, p in enumerate(prompts)]))
        # Some of them, in another order, and one that is known.
        pipeline.submit(replace(step(1, [~2, 5, ~0], [2, 1, 0]), continues=0))
        first, ahead = [(await pipeline.next_result()).token_ids for _ in range(2)]
        pipeline.submit(step(2, [first[2], 5, first[0]], [2, 1, 0]))
        return ahead, (await pipeline.next_result()).token_ids

    ahead, known = asyncio.run(run())
    assert ahead == known


def test_an_error_in_a_micro_batch_reaches_the_one_that_continues_it(stages: Stages) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(0, [10_000]))
        pipeline.submit(make_batch(1, [~0], start=1, continues=0))
        for _ in range(2):
            with pytest.raises(PipelineError):
                await pipeline.next_result()

    asyncio.run(run())


def test_close_may_be_repeated_and_ends_the_pipeline(stages: Stages) -> None:
    async def run() -> None:
        pipeline = await stages.pipeline()
        pipeline.submit(make_batch(0, [1]))
        await pipeline.close()
        await pipeline.close()
        with pytest.raises(PipelineError):
            await pipeline.next_result()

    asyncio.run(run())
    stages.stop()
