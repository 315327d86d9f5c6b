"""Every event that an engine tells of comes, in order, before the news that there are no more."""

import asyncio

import pytest

from gllm_ray.assembly.event_stream import _LAST_MESSAGES_S, EventStream, send_events
from gllm_ray.errors import PipelineError, SchedulerLostError
from gllm_ray.messages import FinishReason, TokenEvent, TokenLogprobs
from gllm_ray.stages.inbox import Outbox

EVENTS = [
    TokenEvent("é", 7, num_cached_tokens=16, prompt_logprobs=b"\x00\xff"),
    TokenEvent("b", 5, logprobs=TokenLogprobs(-0.5, ((5, -0.5), (6, -1.25)))),
    TokenEvent("b", 0, logprobs=TokenLogprobs(-float("inf"), ())),
    TokenEvent("é", 8, FinishReason.LENGTH),
    TokenEvent("b", finish_reason=FinishReason.EXPIRED, error="too late", retry_after_s=1.5),
]


class Engine:
    """Tells of events as a test says, and then fails."""

    def __init__(self, *steps, error=None):
        self.steps = list(steps)
        self.error = error

    async def next_events(self):
        await asyncio.sleep(0)
        if not self.steps:
            if self.error is not None:
                raise self.error
            await asyncio.Event().wait()
        return self.steps.pop(0)


def stream_of(engine):
    return EventStream("127.0.0.1", lambda address: send_events(engine.next_events, address))


async def read(stream, num_events):
    events = []
    while len(events) < num_events:
        events += await asyncio.wait_for(stream.next(), 10)
    return events


def run(scenario):
    asyncio.run(scenario())


def test_events_come_in_order_as_they_were():
    async def scenario():
        stream = stream_of(Engine(EVENTS[:2], EVENTS[2:]))
        events = await read(stream, len(EVENTS))
        assert events == EVENTS
        assert [type(event.finish_reason) for event in events] == [
            type(event.finish_reason) for event in EVENTS
        ]
        stream._sending.cancel()
        with pytest.raises(PipelineError, match="sends no events any more"):
            await stream.next()

    run(scenario)


def test_who_lags_gets_what_gathered_at_once():
    async def scenario():
        stream = stream_of(Engine(*([event] for event in EVENTS)))
        await asyncio.sleep(0.2)
        assert await stream.next() == EVENTS
        stream._sending.cancel()

    run(scenario)


def test_the_failure_of_an_engine_comes_right_after_its_events_even_if_it_overtakes_them():
    async def scenario():
        error = PipelineError("a stage is lost")
        stream = stream_of(Engine(*([event] for event in EVENTS), error=error))
        while not stream._sending.done():  # noqa: ASYNC110 - nothing is read meanwhile
            await asyncio.sleep(0)
        assert await read(stream, len(EVENTS)) == EVENTS
        for _ in range(2):
            with pytest.raises(PipelineError, match="a stage is lost"):
                await asyncio.wait_for(stream.next(), _LAST_MESSAGES_S / 2)

    run(scenario)


def test_the_loss_of_a_scheduler_is_told_at_once():
    async def scenario():
        async def send(_):
            raise SchedulerLostError("killed")

        stream = EventStream("127.0.0.1", send)
        with pytest.raises(SchedulerLostError, match="killed"):
            await asyncio.wait_for(stream.next(), _LAST_MESSAGES_S / 2)

    run(scenario)


def test_a_sender_that_ends_without_a_last_message_is_told_of():
    async def scenario():
        async def send(address):
            outbox = Outbox(address)
            outbox.write([0, EVENTS[:1]])
            outbox.close()
            raise PipelineError("broken")

        stream = EventStream("127.0.0.1", send)
        assert await read(stream, 1) == EVENTS[:1]
        with pytest.raises(PipelineError, match="broken"):
            await asyncio.wait_for(stream.next(), 10)

    run(scenario)


def test_a_lost_message_is_the_loss_of_the_scheduler():
    async def scenario():
        async def send(address):
            outbox = Outbox(address)
            outbox.write([0, EVENTS[:1]])
            outbox.write([2, EVENTS[1:]])
            await asyncio.Event().wait()

        stream = EventStream("127.0.0.1", send)
        assert await read(stream, 1) == EVENTS[:1]
        with pytest.raises(SchedulerLostError, match="message 1 of the scheduler is lost"):
            await asyncio.wait_for(stream.next(), 10)
        stream._sending.cancel()

    run(scenario)
