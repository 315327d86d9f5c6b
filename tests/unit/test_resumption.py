"""Requests outlive replicas: what a client gets does not tell how many it took."""

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.config import FrontEndConfig
from gllm_ray.engine.resumption import ResumingClient
from gllm_ray.errors import InvalidRequestError, OverloadedError, PipelineError
from gllm_ray.messages import FinishReason
from gllm_ray.scheduling import QueueLimits
from tests.factories import make_request
from tests.replica_set import LOST, Fault, Replicas
from tests.unit.test_journal import STOP, ReadingPipeline, expected_events, turns


def replicas_of(faults=(), **options):
    return Replicas(ReadingPipeline, faults, num_blocks=16, **options)


async def collect(client, request, lag=0):
    events = []
    async for step in client.generate(request):
        assert step, "a client gets no empty list"
        events += step
        await turns(lag)
    return events


FAULTS = st.lists(
    st.one_of(
        st.builds(Fault, st.integers(1, 12), st.sampled_from(["dies", "ends"])),
        st.builds(Fault, kind=st.just("breaks"), results=st.integers(0, 12)),
    ),
    max_size=3,
)


@given(
    faults=FAULTS,
    lag=st.integers(0, 5),
    prompt=st.lists(st.integers(0, 90), min_size=1, max_size=9),
    max_tokens=st.integers(1, 12),
    num_prompt_logprobs=st.sampled_from([None, 0, 2]),
)
def test_whatever_came_before_the_faults_the_events_are_those_without(
    faults, lag, prompt, max_tokens, num_prompt_logprobs
):
    request = make_request(
        "a",
        prompt=tuple(prompt),
        max_tokens=max_tokens,
        stop_token_ids=frozenset([STOP]),
        num_prompt_logprobs=num_prompt_logprobs,
    )

    async def scenario():
        async with replicas_of(faults) as replicas:
            client = ResumingClient(replicas, FrontEndConfig())
            events = await collect(client, request, lag)
            assert events == expected_events(request)
            expected = tuple(event.token_id for event in events)
            for output in replicas.outputs[1:]:
                assert output == expected[: len(output)], "a replica goes on where the client is"
            assert await replicas.until_idle() == 0

    asyncio.run(scenario())


def test_one_loss_too_many_ends_the_request_and_tells_the_latest():
    async def scenario():
        faults = [Fault(after=2)] * 3
        async with replicas_of(faults) as replicas:
            client = ResumingClient(replicas, FrontEndConfig(max_losses=2))
            with pytest.raises(PipelineError, match=r"3 replicas were lost under it.*killed") as e:
                await collect(client, make_request("a", max_tokens=12))
            assert "send it again" in e.value.public_message
            assert "killed" not in e.value.public_message
            assert len(await collect(client, make_request("a", max_tokens=3))) == 3

    asyncio.run(scenario())


def test_who_was_accepted_is_neither_refused_nor_forgotten_where_the_queue_is_full():
    async def scenario():
        async with replicas_of([Fault(after=1)], queue=QueueLimits(max_requests=1)) as replicas:
            full = replicas.schedulers[-1]
            full.add(make_request("other", max_tokens=1))
            with pytest.raises(OverloadedError):
                full.add(make_request("refused"))
            request = make_request("a", max_tokens=3)
            client = ResumingClient(replicas, FrontEndConfig())
            assert await collect(client, request) == expected_events(request)
            assert replicas.outputs == [None, ()]

    asyncio.run(scenario())


def test_a_new_request_waits_until_a_replica_takes_it():
    async def scenario():
        async with replicas_of([Fault(after=0)] * 2) as replicas:
            client = ResumingClient(replicas, FrontEndConfig(max_losses=1))
            request = make_request("a", max_tokens=3)
            assert await collect(client, request) == expected_events(request)
            assert replicas.outputs == [None] * 3, "none had accepted it"

    asyncio.run(scenario())


class NoReplica:
    """A `ReplicaSet` without any, after the first was lost."""

    def __init__(self, *, holds):
        self._holds = holds
        self._is_first = True
        self.is_closed = False

    async def run(self, request, output_token_ids):
        if self._is_first:
            self._is_first = False
            yield []
            raise LOST
        try:
            if self._holds:
                await asyncio.sleep(60)
        finally:
            self.is_closed = True
        raise LOST


@pytest.mark.parametrize("holds", [True, False], ids=["held", "refused at once"])
def test_a_request_that_no_replica_takes_in_time_ends_with_the_knob_to_turn(holds):
    async def scenario():
        replicas = NoReplica(holds=holds)
        client = ResumingClient(replicas, FrontEndConfig(resume_timeout_s=0.2))
        with pytest.raises(PipelineError, match=r"0\.2 s \(frontend\.resume_timeout_s\)"):
            await collect(client, make_request("a"))
        assert replicas.is_closed

    asyncio.run(scenario())


class NeverReady:
    """A `ReplicaSet` whose replicas are still starting, or refuse at once."""

    def __init__(self, *, holds):
        self._holds = holds
        self.times_left_s = []

    async def run(self, request, output_token_ids):
        self.times_left_s.append(request.queue_timeout_s)
        if self._holds:
            await asyncio.sleep(60)
        raise LOST
        yield


@pytest.mark.parametrize("holds", [True, False], ids=["held", "refused at once"])
def test_a_new_request_waits_for_a_replica_no_longer_than_it_may(holds):
    async def scenario():
        replicas = NeverReady(holds=holds)
        client = ResumingClient(replicas, FrontEndConfig())
        with pytest.raises(OverloadedError, match="waited longer than it may"):
            await collect(client, make_request("a", queue_timeout_s=0.3))
        left_s = replicas.times_left_s
        assert 0.3 >= left_s[0] > 0
        assert left_s == sorted(set(left_s), reverse=True)
        assert (len(left_s) == 1) is holds

    asyncio.run(scenario())


@pytest.mark.parametrize("faults", [[], [Fault(after=3)]], ids=["first replica", "second replica"])
def test_a_client_that_leaves_aborts_the_request_where_it_runs(faults):
    async def scenario():
        async with replicas_of(faults) as replicas:
            events = ResumingClient(replicas, FrontEndConfig()).generate(
                make_request("a", max_tokens=40)
            )
            num_tokens = 0
            while num_tokens < 20:
                num_tokens += len(await anext(events))
            assert len(replicas.outputs) == len(faults) + 1
            await events.aclose()
            assert await replicas.until_idle() == 0

    asyncio.run(scenario())


def test_a_mistake_of_the_client_is_told_and_not_tried_again():
    async def scenario():
        async with replicas_of() as replicas:
            client = ResumingClient(replicas, FrontEndConfig())
            with pytest.raises(InvalidRequestError):
                await collect(client, make_request("a", max_tokens=10_000))
            assert len(replicas.outputs) == 1

    asyncio.run(scenario())


def test_each_request_that_a_replica_takes_over_is_counted():
    async def scenario():
        taken_over = []
        async with replicas_of([Fault(after=3), Fault(after=0), Fault(after=2)]) as replicas:
            client = ResumingClient(
                replicas, FrontEndConfig(), on_resumption=lambda: taken_over.append(1)
            )
            events = await collect(client, make_request("a", max_tokens=9))
            assert events[-1].finish_reason is FinishReason.LENGTH
        assert len(taken_over) == 2

    asyncio.run(scenario())


class FullThenFree:
    """A `ReplicaSet` that loses a request, has no room for a while, and has some again."""

    def __init__(self, replicas, num_refusals):
        self._replicas = replicas
        self._num_refusals = num_refusals

    async def run(self, request, output_token_ids):
        if output_token_ids is not None and self._num_refusals:
            self._num_refusals -= 1
            raise OverloadedError("all queues are full")
        async with aclosing(self._replicas.run(request, output_token_ids)) as steps:
            async for step in steps:
                yield step


def test_who_was_accepted_waits_where_no_replica_has_room():
    async def scenario():
        async with replicas_of([Fault(after=4)]) as replicas:
            client = ResumingClient(FullThenFree(replicas, 2), FrontEndConfig(max_losses=1))
            request = make_request("a", max_tokens=9)
            assert await collect(client, request) == expected_events(request)

    asyncio.run(scenario())


def test_a_loss_is_logged_once_for_all_its_requests(caplog):
    async def scenario():
        async with replicas_of([Fault(after=2)] * 4) as replicas:
            client = ResumingClient(replicas, FrontEndConfig())
            requests = [make_request(name, max_tokens=3) for name in "abcd"]
            await asyncio.gather(*(collect(client, request) for request in requests))

    asyncio.run(scenario())
    assert [record.getMessage() for record in caplog.records] == [
        "requests go on at another replica: a replica was lost: killed"
    ]
