"""What a recording pipeline notes of an engine's micro-batches."""

import asyncio

from gllm_ray.bench.recording import RecordingPipeline, load_of
from gllm_ray.messages import MicroBatch, SamplingParams, ScheduledSequence
from gllm_ray.scheduling.load import StepLoad
from tests.fake_pipeline import FakePipeline


def batch(batch_id=0, spans=((0, 1),)):
    return MicroBatch(
        batch_id=batch_id,
        sequences=tuple(
            ScheduledSequence(
                seq_id=seq_id,
                epoch=0,
                start=start,
                token_ids=(0,) * length,
                block_table=(0,),
                sampling=SamplingParams(),
            )
            for seq_id, (start, length) in enumerate(spans)
        ),
    )


def record(num_ahead, num_batches):
    """Submit so many first, then one after each result, as an engine does."""

    async def run():
        pipeline = RecordingPipeline(FakePipeline())
        for batch_id in range(num_ahead):
            pipeline.submit(batch(batch_id))
        for batch_id in range(num_ahead, num_batches + num_ahead):
            await pipeline.next_result()
            if batch_id < num_batches:
                pipeline.submit(batch(batch_id))
        return pipeline.steps

    return asyncio.run(run())


def test_the_load_of_a_micro_batch_counts_rows_contexts_and_pairs():
    load = load_of(batch(spans=((9, 1), (99, 1), (0, 20), (30, 10))))
    assert load == StepLoad(2, 10 + 100, 30, 20 * 20 + 10 * 40)


def test_a_micro_batch_that_follows_a_result_tells_when_that_came():
    steps = record(num_ahead=2, num_batches=6)
    assert [step.batch_id for step in steps] == list(range(6))
    assert [step.free_s for step in steps[:2]] == [None, None]
    for before, step in zip(steps, steps[2:], strict=False):
        assert step.free_s == before.result_s
        assert before.result_s <= step.submitted_s <= step.result_s


def test_a_micro_batch_into_an_empty_pipeline_may_have_waited_for_a_request():
    assert [step.free_s for step in record(num_ahead=1, num_batches=3)] == [None] * 3


def test_a_micro_batch_formed_while_a_result_is_awaited_follows_a_request():
    async def run():
        inner = FakePipeline(is_held=True)
        pipeline = RecordingPipeline(inner)
        pipeline.submit(batch(0))
        pipeline.submit(batch(1))
        inner.let_go()
        await pipeline.next_result()
        waiting = asyncio.create_task(pipeline.next_result())
        await asyncio.sleep(0)
        pipeline.submit(batch(2))
        await waiting
        await pipeline.next_result()
        return pipeline.steps

    assert asyncio.run(run())[2].free_s is None
