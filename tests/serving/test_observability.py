"""What is measured of a request does not change it."""

import asyncio

import pytest

from gllm_ray.errors import OverloadedError
from gllm_ray.messages import FinishReason, GenerationRequest, TokenEvent
from gllm_ray.serving.observability import ServiceMetrics

REQUEST = GenerationRequest(request_id="a", prompt_token_ids=(1, 2, 3), max_tokens=3)
STEPS = [
    [TokenEvent("a", 5)],
    [TokenEvent("a", 6), TokenEvent("a", 7, FinishReason.LENGTH)],
]


class Stream:
    """Events of a request, and whether they were closed."""

    def __init__(self, steps, error=None):
        self.steps, self.error, self.is_closed = steps, error, False

    async def events(self):
        try:
            for step in self.steps:
                yield step
            if self.error is not None:
                raise self.error
        finally:
            self.is_closed = True


@pytest.fixture(scope="module")
def metrics():
    return ServiceMetrics("a-model")


def test_the_events_are_those_of_the_engine(metrics):
    async def run():
        return [step async for step in metrics.observe(REQUEST, Stream(STEPS).events())]

    assert asyncio.run(run()) == STEPS


def test_a_consumer_that_leaves_closes_the_stream(metrics):
    stream = Stream(STEPS)

    async def run():
        events = metrics.observe(REQUEST, stream.events())
        await anext(events)
        await events.aclose()

    asyncio.run(run())
    assert stream.is_closed


def test_an_error_reaches_the_consumer(metrics):
    stream = Stream([], OverloadedError("full", 1.0))

    async def run():
        await anext(metrics.observe(REQUEST, stream.events()))

    with pytest.raises(OverloadedError, match="full"):
        asyncio.run(run())
    assert stream.is_closed
