"""What is measured of a request does not change it."""

import asyncio

import pytest

from gllm_ray.errors import OverloadedError
from gllm_ray.messages import FinishReason, GenerationRequest, TokenEvent
from gllm_ray.model.detokenizer import StopRule
from gllm_ray.serving.observability import ServiceMetrics
from gllm_ray.serving.text_stream import text_deltas

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


class Ends:
    """In place of Ray's counter: the reasons why requests ended."""

    def __init__(self):
        self.reasons = []

    def inc(self, tags):
        self.reasons.append(tags["finished_reason"])


@pytest.fixture
def ends(metrics, monkeypatch):
    counter = Ends()
    monkeypatch.setitem(metrics._metrics, "request_success_total", counter)
    return counter


@pytest.mark.parametrize("with_limit", [False, True])
def test_an_output_that_comes_to_a_stop_string_is_counted_as_stopped(
    metrics, ends, tokenizer, with_limit
):
    events = [TokenEvent("a", token_id) for token_id in tokenizer.encode("one two three")]
    if with_limit:
        events.append(TokenEvent("a", finish_reason=FinishReason.LENGTH))
    stream = Stream([events])

    async def run():
        observed = metrics.observe(REQUEST, stream.events())
        detokenizer = tokenizer.new_detokenizer((), StopRule(["two"]))
        return [d async for d in text_deltas(0, observed, detokenizer)]

    (delta,) = asyncio.run(run())
    assert delta.finish_reason is FinishReason.STOP
    assert ends.reasons == ["stop"]
    assert stream.is_closed


def test_a_client_that_leaves_counts_as_an_abort(metrics, ends, tokenizer):
    async def run():
        observed = metrics.observe(REQUEST, Stream(STEPS).events())
        deltas = text_deltas(0, observed, tokenizer.new_detokenizer((), StopRule(["two"])))
        await anext(deltas)
        await deltas.aclose()

    asyncio.run(run())
    assert ends.reasons == ["abort"]
