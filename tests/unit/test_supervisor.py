"""An engine whose pipeline breaks and is repaired."""

import asyncio
from contextlib import asynccontextmanager

import pytest

from gllm_ray.config import RecoveryConfig
from gllm_ray.engine.engine import Engine
from gllm_ray.engine.supervisor import Supervisor
from gllm_ray.errors import PipelineError, StageLostError
from gllm_ray.messages import FinishReason
from tests.factories import make_request, make_scheduler
from tests.fake_pipeline import RepairableFakePipeline
from tests.unit.test_engine import drain

LOST = StageLostError("stage 1 on host x died")


@asynccontextmanager
async def supervised(pipeline, **recovery):
    config = RecoveryConfig(**{"backoff_s": 0.0} | recovery)
    scheduler = make_scheduler(num_blocks=256)
    engine = Engine(scheduler, pipeline, Supervisor(pipeline, config))
    engine.start()
    await asyncio.sleep(0)
    yield engine
    assert engine._failure or scheduler.kv_utilization == 0
    await engine.close()


async def add_all(engine, names, **options):
    for index, name in enumerate(names):
        prompt = [1000 + index, *range(1, 12)]
        await engine.add(make_request(name, prompt=prompt, max_tokens=9, **options))


def tokens_by_request(events):
    tokens = {}
    for event in events:
        tokens.setdefault(event.request_id, []).append((event.token_id, event.finish_reason))
    return tokens


async def undisturbed(names):
    async with supervised(RepairableFakePipeline()) as engine:
        await add_all(engine, names)
        return tokens_by_request(await drain(engine, len(names)))


@pytest.mark.parametrize("num_faults", [1, 3])
def test_every_request_gets_the_tokens_it_would_have_got_anyway(num_faults):
    async def scenario():
        pipeline = RepairableFakePipeline()
        async with supervised(pipeline) as engine:
            await add_all(engine, "abc")
            events = []
            for number in range(num_faults):
                while len(events) < 3 * number + 1:
                    events += await engine.next_events()
                pipeline.failure = LOST
            events += await drain(engine, 3)
            assert pipeline.num_repairs == num_faults
            return tokens_by_request(events)

    assert asyncio.run(scenario()) == asyncio.run(undisturbed("abc"))


def test_who_waits_for_events_while_nothing_is_open_learns_that_the_pipeline_is_lost():
    async def scenario():
        pipeline = RepairableFakePipeline()
        async with supervised(pipeline, enabled=False) as engine:
            reader = asyncio.create_task(engine.next_events())
            await asyncio.sleep(0)
            pipeline.lose(LOST)
            with pytest.raises(StageLostError):
                await asyncio.wait_for(reader, 5)

    asyncio.run(scenario())


def test_a_stage_that_is_lost_while_nothing_runs_is_replaced_before_the_next_request():
    async def scenario():
        pipeline = RepairableFakePipeline()
        async with supervised(pipeline) as engine:
            pipeline.lose(LOST)
            async with asyncio.timeout(1):
                while not pipeline.num_repairs:  # noqa: ASYNC110
                    await asyncio.sleep(0)
            await add_all(engine, "a")
            assert len(await drain(engine, 1)) == 9

    asyncio.run(scenario())


def test_requests_come_and_go_during_a_repair():
    async def scenario():
        pipeline = RepairableFakePipeline()
        async with supervised(pipeline) as engine:
            pipeline.may_repair.clear()
            await add_all(engine, ["runs", "is aborted"])
            pipeline.failure = LOST
            await asyncio.sleep(0.01)
            assert pipeline.num_repairs == 1
            num_submitted = len(pipeline.submitted)
            await engine.abort("is aborted")
            await add_all(engine, ["comes late", "hurries"], queue_timeout_s=0.02)
            await engine.abort("comes late")
            await add_all(engine, ["comes later"])
            assert engine.load().num_requests == 3
            await asyncio.sleep(0.04)
            assert len(pipeline.submitted) == num_submitted
            pipeline.may_repair.set()
            return tokens_by_request(await drain(engine, 5))

    ends = {name: tokens[-1][1] for name, tokens in asyncio.run(scenario()).items()}
    assert ends == {
        "runs": FinishReason.LENGTH,
        "is aborted": FinishReason.ABORT,
        "comes late": FinishReason.ABORT,
        "hurries": FinishReason.EXPIRED,
        "comes later": FinishReason.LENGTH,
    }


def test_who_is_aborted_in_flight_when_a_stage_dies_ends_once():
    async def scenario():
        pipeline = RepairableFakePipeline()
        async with supervised(pipeline) as engine:
            await add_all(engine, "ab")
            await asyncio.sleep(0)
            await engine.abort("a")
            pipeline.failure = LOST
            events = await drain(engine, 2)
            return tokens_by_request(events)

    tokens = asyncio.run(scenario())
    assert tokens["a"] == [(None, FinishReason.ABORT)]
    assert len(tokens["b"]) == 9


def test_too_many_faults_in_a_row_end_every_request_and_name_the_first_cause_once():
    async def scenario():
        pipeline = RepairableFakePipeline()
        pipeline.refusals.extend(PipelineError(f"attempt {i} failed") for i in range(9))
        async with supervised(pipeline, max_attempts=3) as engine:
            await add_all(engine, "ab")
            pipeline.failure = LOST
            events = await drain(engine, 2)
            with pytest.raises(PipelineError) as caught:
                engine.load()
            assert pipeline.num_repairs == 3
            return events, str(caught.value)

    events, message = asyncio.run(scenario())
    assert {event.finish_reason for event in events} == {FinishReason.ERROR}
    assert message == f"gave up after 4 faults in a row; the first: {LOST}"


def test_without_recovery_a_lost_stage_ends_every_request():
    async def scenario():
        pipeline = RepairableFakePipeline()
        async with supervised(pipeline, enabled=False) as engine:
            await add_all(engine, "ab")
            pipeline.failure = LOST
            events = await drain(engine, 2)
            with pytest.raises(StageLostError, match=str(LOST)):
                engine.load()
            assert not pipeline.num_repairs
            return events

    assert {e.error for e in asyncio.run(scenario())} == {StageLostError.public_message}


def test_who_comes_while_a_poison_is_looked_for_is_served_before_it_is_found():
    names = "abcdefgh"

    async def scenario():
        pipeline = RepairableFakePipeline(poisons={1007})
        async with supervised(pipeline, max_attempts=8) as engine:
            await add_all(engine, names)
            while pipeline.num_repairs < 2:  # noqa: ASYNC110
                await asyncio.sleep(0)
            await engine.add(make_request("late", prompt=[2000, 1, 2], max_tokens=9))
            return await drain(engine, len(names) + 1)

    events = asyncio.run(scenario())
    reasons = [event.finish_reason for event in events]
    assert reasons.count(FinishReason.LENGTH) == len(names)
    first_of_late = next(i for i, event in enumerate(events) if event.request_id == "late")
    assert first_of_late < reasons.index(FinishReason.BLAMED)


def test_requests_that_break_the_pipeline_each_time_are_failed_and_all_others_live():
    names = "abcdefghijkl"

    async def scenario():
        pipeline = RepairableFakePipeline(poisons={1003, 1007})
        async with supervised(pipeline, max_attempts=8) as engine:
            await add_all(engine, names)
            tokens = tokens_by_request(await drain(engine, len(names)))
            await add_all(engine, ["later"])
            assert len(await drain(engine, 1)) == 9
            return tokens

    tokens, expected = asyncio.run(scenario()), asyncio.run(undisturbed(names))
    for poison in "dh":
        assert tokens.pop(poison) == [(None, FinishReason.BLAMED)]
        del expected[poison]
    assert tokens == expected
