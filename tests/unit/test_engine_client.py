import asyncio
from contextlib import aclosing

import pytest

from gllm_ray.engine.client import MAX_EVENTS_AT_ONCE, EngineClient
from gllm_ray.engine.completion import OutputCompleteError, complete, passing_on
from gllm_ray.engine.engine import Engine
from gllm_ray.errors import InvalidRequestError, OverloadedError, PipelineError, StageLostError
from gllm_ray.messages import FinishReason, TokenEvent
from tests.factories import make_request, make_scheduler
from tests.fakes import ScriptedEndpoint, ScriptedPipeline


def run_with_client(scenario):
    """Run `scenario(client, endpoint)` and check that it leaves nothing behind."""

    async def run():
        endpoint = ScriptedEndpoint()
        client = EngineClient(endpoint)
        await client.start()
        result = await scenario(client, endpoint)
        assert not client._streams
        await client.close()
        assert not client._aborts
        return result

    return asyncio.run(run())


def token(request_id, token_id, finish_reason=None):
    return TokenEvent(request_id=request_id, token_id=token_id, finish_reason=finish_reason)


async def settle():
    for _ in range(5):
        await asyncio.sleep(0)


async def collect(stream):
    return [events async for events in stream]


def test_each_request_gets_its_own_events_in_order():
    async def scenario(client, endpoint):
        streams = [asyncio.create_task(collect(client.generate(make_request(n)))) for n in "ab"]
        await settle()
        endpoint.send(token("a", 1), token("b", 2), token("a", 3))
        await settle()
        endpoint.send(token("b", 4, FinishReason.STOP), token("a", 5, FinishReason.LENGTH))
        return await asyncio.gather(*streams)

    for name, received in zip("ab", run_with_client(scenario), strict=True):
        events = [event for events in received for event in events]
        assert {event.request_id for event in events} == {name}
        assert [event.token_id for event in events] == ([1, 3, 5] if name == "a" else [2, 4])
        assert [event.finish_reason is None for event in events[:-1]] == [True] * (len(events) - 1)


@pytest.mark.parametrize(
    ("num_later", "sizes"),
    [
        (4, [4]),
        (MAX_EVENTS_AT_ONCE, [MAX_EVENTS_AT_ONCE]),
        (2 * MAX_EVENTS_AT_ONCE + 1, [MAX_EVENTS_AT_ONCE, MAX_EVENTS_AT_ONCE, 1]),
    ],
)
def test_a_consumer_that_lags_gets_what_gathered_in_lists_of_bounded_size(num_later, sizes):
    async def scenario(client, endpoint):
        async with aclosing(client.generate(make_request("a"))) as stream:
            first = asyncio.create_task(anext(stream))
            await settle()
            endpoint.send(token("a", 0))
            await first
            for token_id in range(1, num_later):
                endpoint.send(token("a", token_id))
            endpoint.send(token("a", num_later, FinishReason.STOP))
            await settle()
            return await collect(stream)

    lists = run_with_client(scenario)
    assert [len(events) for events in lists] == sizes
    token_ids = [event.token_id for events in lists for event in events]
    assert token_ids == list(range(1, num_later + 1))


def test_a_stream_that_ended_is_not_aborted():
    async def scenario(client, endpoint):
        stream = client.generate(make_request("a"))
        first = asyncio.create_task(anext(stream))
        await settle()
        endpoint.send(token("a", 1, FinishReason.STOP))
        await first
        await stream.aclose()
        assert endpoint.aborted == []

    run_with_client(scenario)


def test_a_stream_closed_early_is_aborted_once():
    async def scenario(client, endpoint):
        stream = client.generate(make_request("a"))
        first = asyncio.create_task(anext(stream))
        await settle()
        endpoint.send(token("a", 1))
        await first
        await stream.aclose()
        await stream.aclose()
        endpoint.send(token("a", 2), token("a", None, FinishReason.ABORT))
        await settle()
        assert endpoint.aborted == ["a"]
        assert endpoint.completed == {}

    run_with_client(scenario)


async def passed_on(events):
    async with passing_on(events) as steps:
        async for step in steps:
            yield step


@pytest.mark.parametrize("has_ended", [True, False])
def test_an_output_that_is_complete_is_aborted_as_one_unless_its_request_has_ended(has_ended):
    async def scenario(client, endpoint):
        stream = passed_on(client.generate(make_request("a")))
        first = asyncio.create_task(anext(stream))
        await settle()
        endpoint.send(token("a", 1), token("a", 2, FinishReason.LENGTH if has_ended else None))
        await first
        await complete(stream, OutputCompleteError(2))
        assert endpoint.aborted == ([] if has_ended else ["a"])
        assert endpoint.completed == ({} if has_ended else {"a": 2})

    run_with_client(scenario)


def test_events_that_are_passed_on_are_closed_with_those_who_pass_them_on():
    async def scenario(client, endpoint):
        stream = passed_on(client.generate(make_request("a")))
        first = asyncio.create_task(anext(stream))
        await settle()
        endpoint.send(token("a", 1))
        await first
        await stream.aclose()
        assert endpoint.aborted == ["a"]
        assert endpoint.completed == {}

    run_with_client(scenario)


@pytest.mark.parametrize("is_accepted", [True, False], ids=["waiting for events", "being added"])
def test_a_cancelled_consumer_aborts_its_request_once(is_accepted):
    async def scenario(client, endpoint):
        if not is_accepted:
            endpoint.may_add.clear()
        consumer = asyncio.create_task(collect(client.generate(make_request("a"))))
        await settle()
        consumer.cancel()
        with pytest.raises(asyncio.CancelledError):
            await consumer
        assert endpoint.aborted == ["a"]

    run_with_client(scenario)


@pytest.mark.parametrize("is_accepted", [True, False], ids=["waiting for events", "being added"])
def test_a_request_that_another_aborts_ends_whatever_the_engine_tells(is_accepted):
    async def scenario(client, endpoint):
        if not is_accepted:
            endpoint.may_add.clear()
        consumer = asyncio.create_task(collect(client.generate(make_request("a"))))
        await settle()
        await client.abort("a")
        await client.abort("a")
        endpoint.may_add.set()
        assert await consumer == [[TokenEvent("a", finish_reason=FinishReason.ABORT)]]
        assert endpoint.aborted == ["a"]

    run_with_client(scenario)


def test_a_request_that_no_engine_takes_in_its_time_is_refused_and_aborted():
    async def scenario(client, endpoint):
        endpoint.may_add.clear()
        with pytest.raises(OverloadedError, match="waited longer than it may"):
            await collect(client.generate(make_request("a", queue_timeout_s=0.01)))
        await settle()
        assert endpoint.aborted == ["a"]

    run_with_client(scenario)


def test_a_consumer_cancelled_again_and_again_cannot_cancel_its_abort():
    async def scenario(client, endpoint):
        endpoint.may_abort.clear()
        consumer = asyncio.create_task(collect(client.generate(make_request("a"))))
        await settle()
        for _ in range(3):
            consumer.cancel()
            await settle()
        assert consumer.cancelled()
        assert endpoint.aborted == []
        endpoint.may_abort.set()
        await settle()
        assert endpoint.aborted == ["a"]

    run_with_client(scenario)


@pytest.mark.parametrize("error", [InvalidRequestError("no"), OverloadedError("full")])
def test_a_refusal_reaches_the_caller_and_is_not_aborted(error):
    async def scenario(client, endpoint):
        endpoint.refusal = error
        with pytest.raises(type(error)) as caught:
            await collect(client.generate(make_request("a")))
        assert caught.value is error
        assert endpoint.aborted == []

    run_with_client(scenario)


def test_a_request_id_in_use_is_refused_and_its_owner_goes_on():
    async def scenario(client, endpoint):
        owner = asyncio.create_task(collect(client.generate(make_request("a"))))
        await settle()
        with pytest.raises(InvalidRequestError, match="'a' is in use"):
            await collect(client.generate(make_request("a")))
        endpoint.send(token("a", 1, FinishReason.STOP))
        assert len(await owner) == 1
        assert endpoint.aborted == []

    run_with_client(scenario)


def test_a_broken_engine_ends_every_stream_after_its_last_event_and_refuses_new_ones():
    error = StageLostError("stage 1 died")

    async def scenario(client, endpoint):
        received = []

        async def consume(name):
            async for events in client.generate(make_request(name)):
                received.extend(events)

        consumers = [asyncio.create_task(consume(name)) for name in "abc"]
        await settle()
        await client.check_health()
        endpoint.send(token("a", 1))
        endpoint.fail(error)
        results = await asyncio.gather(*consumers, return_exceptions=True)
        assert results == [error] * 3
        assert [event.token_id for event in received] == [1]
        with pytest.raises(StageLostError):
            await anext(client.generate(make_request("d")))
        with pytest.raises(StageLostError):
            await client.check_health()
        assert len(endpoint.added) == 3
        assert endpoint.aborted == []

    run_with_client(scenario)


def test_an_error_of_any_kind_while_fetching_events_leaves_nobody_waiting(caplog):
    async def scenario(client, endpoint):
        consumer = asyncio.create_task(collect(client.generate(make_request("a"))))
        await settle()
        endpoint.fail(ZeroDivisionError("a secret"))
        with pytest.raises(PipelineError, match=r"^internal error: ZeroDivisionError$"):
            await consumer

    run_with_client(scenario)
    assert "fetching events failed" in caplog.text


def test_closing_the_client_ends_open_streams():
    async def scenario(client, endpoint):
        consumer = asyncio.create_task(collect(client.generate(make_request("a"))))
        await settle()
        await client.close()
        with pytest.raises(PipelineError, match="shutting down"):
            await consumer
        assert endpoint.aborted == []

    run_with_client(scenario)


def test_an_engine_gets_its_blocks_back_from_streams_closed_early():
    async def scenario():
        scheduler = make_scheduler()
        engine = Engine(scheduler, ScriptedPipeline([5]))
        client = EngineClient(engine)
        engine.start()
        await client.start()
        streams = [client.generate(make_request(name, max_tokens=100)) for name in "abc"]
        for stream in streams:
            await anext(stream)
            await stream.aclose()
        for _ in range(4):
            await settle()
        assert scheduler.is_idle
        assert scheduler.kv_utilization == 0
        await client.close()
        await engine.close()

    asyncio.run(scenario())
