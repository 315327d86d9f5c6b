import asyncio

import pytest

from gllm_ray.engine.engine import Engine
from gllm_ray.errors import InvalidRequestError, PipelineError, StageLostError
from gllm_ray.messages import FinishReason, OpenRequest
from gllm_ray.scheduling import QueueLimits
from tests.factories import make_request, make_scheduler
from tests.fake_pipeline import FakePipeline


async def drain(engine, num_requests):
    """Collect events until every request has ended."""
    events = []
    while sum(event.finish_reason is not None for event in events) < num_requests:
        events += await engine.next_events()
    return events


@pytest.mark.parametrize("ring", [False, True], ids=["", "ring"])
def test_every_request_gets_its_tokens_and_one_end(ring):
    async def scenario():
        engine = Engine(make_scheduler(ring=ring), FakePipeline())
        engine.start()
        for name in "abc":
            await engine.add(make_request(name, max_tokens=5))
        events = await drain(engine, 3)
        await engine.close()
        return events

    events = asyncio.run(scenario())
    for name in "abc":
        mine = [event for event in events if event.request_id == name]
        assert [event.finish_reason for event in mine] == [None] * 4 + [FinishReason.LENGTH]
        assert all(event.token_id is not None for event in mine)


def test_requests_of_one_turn_share_a_micro_batch():
    async def scenario():
        pipeline = FakePipeline(is_held=True)
        engine = Engine(make_scheduler(), pipeline)
        engine.start()
        await asyncio.sleep(0)
        for name in "abc":
            await engine.add(make_request(name))
        await asyncio.sleep(0.01)
        await engine.close()
        return pipeline

    pipeline = asyncio.run(scenario())
    assert len(pipeline.submitted[0].sequences) == 3
    assert pipeline.is_closed


def test_requests_of_one_turn_that_can_run_at_once_do_not_count_as_waiting():
    async def main():
        scheduler = make_scheduler(num_blocks=256, queue=QueueLimits(max_requests=4))
        engine = Engine(scheduler, FakePipeline())
        engine.start()
        for index in range(8):
            await engine.add(make_request(str(index)))
        await drain(engine, 8)
        await engine.close()

    asyncio.run(main())


def test_a_request_that_arrives_while_a_result_is_awaited_enters_the_pipeline_at_once():
    async def scenario():
        pipeline = FakePipeline(is_held=True)
        engine = Engine(make_scheduler(num_stages=2), pipeline)
        engine.start()
        await engine.add(make_request("first"))
        await asyncio.sleep(0.01)
        assert len(pipeline.submitted) == 1
        await engine.add(make_request("second"))
        await asyncio.sleep(0.01)
        assert len(pipeline.submitted) == 2
        pipeline.let_go()
        await drain(engine, 2)
        await engine.close()

    asyncio.run(scenario())


def test_a_lost_stage_ends_every_open_request_and_refuses_new_ones():
    async def scenario():
        pipeline = FakePipeline(is_held=True)
        engine = Engine(make_scheduler(), pipeline)
        engine.start()
        for name in "abc":
            await engine.add(make_request(name))
        await asyncio.sleep(0.01)
        pipeline.failure = StageLostError("stage 1 on host x died")
        pipeline.let_go()
        events = await drain(engine, 3)
        with pytest.raises(StageLostError):
            await engine.add(make_request("late"))
        with pytest.raises(StageLostError):
            await engine.restore([OpenRequest(request=make_request("late"))])
        with pytest.raises(StageLostError):
            await engine.next_events()
        with pytest.raises(StageLostError):
            engine.load()
        await engine.close()
        return events

    events = asyncio.run(scenario())
    assert {event.finish_reason for event in events} == {FinishReason.ERROR}
    assert {event.error for event in events} == {StageLostError.public_message}


def test_a_waiting_reader_learns_that_the_pipeline_broke():
    async def scenario():
        pipeline = FakePipeline(is_held=True)
        engine = Engine(make_scheduler(), pipeline)
        engine.start()
        await engine.add(make_request(max_tokens=1))
        reader = asyncio.create_task(drain(engine, 2))
        await asyncio.sleep(0.01)
        pipeline.failure = PipelineError("broken")
        pipeline.let_go()
        with pytest.raises(PipelineError, match="broken"):
            await asyncio.wait_for(reader, 1)
        await engine.close()

    asyncio.run(scenario())


def test_an_error_of_ours_ends_every_open_request_too():
    async def scenario():
        pipeline = FakePipeline()
        pipeline.failure = ZeroDivisionError()
        engine = Engine(make_scheduler(), pipeline)
        engine.start()
        await engine.add(make_request())
        async with asyncio.timeout(5):
            (event,) = await drain(engine, 1)
        with pytest.raises(PipelineError, match="internal error: ZeroDivisionError"):
            await engine.next_events()
        await engine.close()
        return event

    assert asyncio.run(scenario()).finish_reason is FinishReason.ERROR


def test_nothing_is_computed_once_it_is_closed():
    async def scenario():
        pipeline = FakePipeline(is_held=True)
        engine = Engine(make_scheduler(), pipeline)
        engine.start()
        await engine.add(make_request())
        await asyncio.sleep(0.01)
        await engine.close()
        num_submitted = len(pipeline.submitted)
        pipeline.let_go()
        await asyncio.sleep(0.01)
        assert len(pipeline.submitted) == num_submitted == 1

    asyncio.run(scenario())


def test_abort_ends_a_request_with_one_event():
    async def scenario():
        pipeline = FakePipeline(is_held=True)
        engine = Engine(make_scheduler(num_stages=1), pipeline)
        engine.start()
        await engine.add(make_request("in flight"))
        await asyncio.sleep(0.01)
        await engine.add(make_request("waiting"))
        await engine.abort("waiting")
        await engine.abort("in flight")
        await engine.abort("unknown")
        pipeline.let_go()
        events = await drain(engine, 2)
        await engine.close()
        return events

    events = asyncio.run(scenario())
    assert [(e.request_id, e.finish_reason) for e in events] == [
        ("waiting", FinishReason.ABORT),
        ("in flight", FinishReason.ABORT),
    ]


def test_an_invalid_request_is_refused_and_leaves_nothing_behind():
    async def scenario():
        engine = Engine(make_scheduler(), FakePipeline())
        engine.start()
        with pytest.raises(InvalidRequestError):
            await engine.add(make_request(num_prompt_tokens=0))
        await engine.add(make_request())
        events = await drain(engine, 1)
        await engine.close()
        return events

    assert len(asyncio.run(scenario())) == 4
