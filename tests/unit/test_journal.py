"""Requests outlive their engine: what a client gets does not tell how many engines it took."""

import asyncio
from collections import defaultdict, deque
from contextlib import aclosing
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gllm_ray.engine.client import EngineClient
from gllm_ray.engine.engine import Engine
from gllm_ray.engine.journal import Journal, JournaledEndpoint
from gllm_ray.errors import InvalidRequestError, OverloadedError, PipelineError, SchedulerLostError
from gllm_ray.messages import FinishReason, MicroBatch, MicroBatchResult, OpenRequest, TokenEvent
from gllm_ray.scheduling import QueueLimits
from tests.factories import make_request, make_scheduler, prompt_logprobs_of, told_of

LOST = SchedulerLostError("the scheduler was lost: killed")
STOP = 107


def next_token(tokens):
    """What the model says to a text."""
    return 100 + (7 * sum(tokens) + len(tokens)) % 50


def expected_events(request):
    tokens, events = list(request.prompt_token_ids), []
    while not events or events[-1].finish_reason is None:
        token, reason = next_token(tokens), None
        tokens.append(token)
        if token in request.stop_token_ids:
            reason = FinishReason.STOP
        elif len(events) + 1 == request.max_tokens:
            reason = FinishReason.LENGTH
        of_prompt = {} if events else told_of_prompt(request)
        events.append(TokenEvent(request.request_id, token, reason, **of_prompt))
    return events


def told_of_prompt(request):
    """What comes with the first token."""
    num_likely = request.num_prompt_logprobs
    is_told = num_likely is not None
    logprobs = told_of(request.prompt_token_ids[1:], num_likely) if is_told else None
    return {"num_cached_tokens": 0, "prompt_logprobs": logprobs}


class ReadingPipeline:
    """A pipeline whose tokens depend on all tokens before them, and on nothing else."""

    def __init__(self):
        self._queue: deque[MicroBatch] = deque()
        self._texts = defaultdict(list)

    def submit(self, batch):
        self._queue.append(batch)

    async def next_result(self):
        await asyncio.sleep(0)
        batch = self._queue.popleft()
        for item in batch.sequences:
            text = self._texts[item.seq_id]
            text[item.start :] = item.token_ids
        sampling = [item.seq_id for item in batch.sequences if item.sampling is not None]
        token_ids = tuple(next_token(self._texts[seq_id]) for seq_id in sampling)
        return MicroBatchResult(
            batch_id=batch.batch_id,
            token_ids=token_ids,
            prompt_logprobs=prompt_logprobs_of(batch),
        )

    async def close(self):
        pass


class MortalEngine:
    """A real engine that can be lost, with what it was about to answer.

    Args:
        latency: Turns of the event loop that an answer takes.
        add_latency: Those of the answer to `add`, which events may overtake.
    """

    def __init__(self, latency=0, add_latency=0, **options):
        self.scheduler = make_scheduler(num_blocks=16, **options)
        self._engine = Engine(self.scheduler, ReadingPipeline())
        self._engine.start()
        self._latency = latency
        self._add_latency = add_latency
        self._death = asyncio.get_running_loop().create_future()

    async def die(self):
        if not self._death.done():
            self._death.set_result(None)
            await self._engine.close()

    async def add(self, request):
        await self._answer(self._engine.add(request), self._add_latency)

    async def abort(self, request_id, num_output_tokens=None):
        await self._answer(self._engine.abort(request_id, num_output_tokens), self._latency)

    async def next_events(self):
        return await self._answer(self._engine.next_events(), self._latency)

    async def restore(self, requests):
        await self._answer(self._engine.restore(requests), self._latency)

    async def _answer(self, call, latency):
        answer = asyncio.create_task(late(call, latency))
        await asyncio.wait([answer, self._death], return_when=asyncio.FIRST_COMPLETED)
        if self._death.done():
            answer.cancel()
            await asyncio.gather(answer, return_exceptions=True)
            raise LOST
        return answer.result()


async def late(call, latency):
    answer = await call
    await turns(latency)
    return answer


async def turns(number):
    for _ in range(number):
        await asyncio.sleep(0)


@dataclass
class Life:
    """An engine, how long it lives, and how long there is none after it; in turns of the loop.

    One that was taken for dead may go on, and answer, until the next is there.
    """

    latency: int
    add_latency: int
    alive: int
    gone: int
    goes_on: bool


@dataclass
class Visit:
    """A client's request: when it comes, and after how many lists of events it goes, if early."""

    arrival: int
    num_prompt_tokens: int
    max_tokens: int
    patience: int | None
    num_prompt_logprobs: int | None


TURNS, LATENCY = st.integers(0, 40), st.integers(0, 12)
LIVES = st.lists(st.builds(Life, LATENCY, LATENCY, TURNS, TURNS, st.booleans()), max_size=4)
VISITS = st.lists(
    st.builds(
        Visit,
        TURNS,
        st.integers(1, 12),
        st.integers(1, 12),
        st.none() | st.none() | st.integers(0, 6),
        st.sampled_from([None, 0, 2]),
    ),
    min_size=1,
    max_size=8,
)


async def replace_engines(endpoint, engine, lives):
    """Let each engine go in its turn; returns the last, which lives on."""
    for life in lives:
        await turns(life.alive)
        if not life.goes_on:
            await engine.die()
        endpoint.note_loss(engine, LOST)
        await endpoint.loss
        await turns(life.gone)
        following = MortalEngine(life.latency, life.add_latency)
        await endpoint.resume(following)
        await engine.die()
        engine = following
    return engine


async def visit(client, index, plan):
    prompt = range(index + 1, index + 1 + plan.num_prompt_tokens)
    request = make_request(
        f"{index}",
        prompt=prompt,
        max_tokens=plan.max_tokens,
        stop_token_ids=frozenset({STOP}),
        num_prompt_logprobs=plan.num_prompt_logprobs,
    )
    await turns(plan.arrival)
    events, num_lists = [], 0
    async with aclosing(client.generate(request)) as stream:
        if plan.patience != 0:
            async for some in stream:
                events += some
                num_lists += 1
                if num_lists == plan.patience:
                    break
    return request, plan, events


@given(lives=LIVES, visits=VISITS, latency=LATENCY, add_latency=LATENCY)
def test_every_client_gets_the_tokens_it_would_have_got_from_one_engine(
    lives, visits, latency, add_latency
):
    async def scenario():
        first = MortalEngine(latency, add_latency)
        endpoint = JournaledEndpoint(first)
        client = EngineClient(endpoint)
        await client.start()
        async with asyncio.timeout(10):
            engine, *answers = await asyncio.gather(
                replace_engines(endpoint, first, lives),
                *(visit(client, index, plan) for index, plan in enumerate(visits)),
            )
            for request, plan, events in answers:
                expected = expected_events(request)
                assert events == expected[: len(events)]
                assert plan.patience is not None or len(events) == len(expected)
            while not engine.scheduler.is_idle:  # noqa: ASYNC110
                await asyncio.sleep(0)
        assert engine.scheduler.kv_utilization == 0
        assert not endpoint._journal._requests
        assert not endpoint._journal._output
        await client.close()
        await engine.die()

    asyncio.run(scenario())


def test_what_is_asked_while_there_is_no_engine_waits_and_aborts_do_not():
    async def scenario():
        first = MortalEngine()
        endpoint = JournaledEndpoint(first)
        await endpoint.add(make_request("a", max_tokens=50))
        await first.die()
        endpoint.note_loss(first, LOST)
        late = asyncio.create_task(endpoint.add(make_request("b")))
        await turns(5)
        assert not late.done()
        await endpoint.abort("a")
        second = MortalEngine()
        await endpoint.resume(second)
        await late
        assert second.scheduler.num_requests == 1
        await second.die()

    asyncio.run(scenario())


def test_what_is_aborted_while_the_next_engine_is_told_of_it_is_aborted_there():
    async def scenario():
        first = MortalEngine()
        endpoint = JournaledEndpoint(first)
        await endpoint.add(make_request("a", max_tokens=50))
        endpoint.note_loss(first, LOST)
        second = MortalEngine(latency=3)
        resuming = asyncio.create_task(endpoint.resume(second))
        await turns(3)
        assert second.scheduler.num_requests == 1
        await endpoint.abort("a")
        await resuming
        await turns(10)
        assert second.scheduler.is_idle
        await first.die()
        await second.die()

    asyncio.run(scenario())


def test_the_late_answer_of_an_engine_taken_for_dead_does_not_count():
    async def scenario():
        first = MortalEngine(latency=20)
        endpoint = JournaledEndpoint(first)
        request = make_request("a", max_tokens=9)
        await endpoint.add(request)
        fetching = asyncio.create_task(endpoint.next_events())
        await turns(10)
        endpoint.note_loss(first, LOST)
        second = MortalEngine()
        await endpoint.resume(second)
        await turns(30)
        events = await fetching
        while len(events) < 9:
            events += await endpoint.next_events()
        assert events == expected_events(request)
        await first.die()
        await second.die()

    asyncio.run(scenario())


def test_a_request_whose_token_overtook_the_answer_of_a_lost_engine_is_not_sent_again():
    async def scenario():
        first = MortalEngine(add_latency=1000)
        endpoint = JournaledEndpoint(first)
        request = make_request("a", max_tokens=9)
        adding = asyncio.create_task(endpoint.add(request))
        events = await endpoint.next_events()
        assert not adding.done()
        await first.die()
        await endpoint.loss
        second = MortalEngine()
        await endpoint.resume(second)
        await adding
        while len(events) < 9:
            events += await endpoint.next_events()
        assert events == expected_events(request)
        await second.die()

    asyncio.run(scenario())


def test_what_another_replica_began_goes_on_from_its_output_also_after_a_loss_here():
    async def scenario():
        request = make_request("a", max_tokens=9)
        expected = expected_events(request)
        output = tuple(event.token_id for event in expected[:3])
        first = MortalEngine()
        endpoint = JournaledEndpoint(first)
        await endpoint.restore([OpenRequest(request=request, output_token_ids=output)])
        events = await endpoint.next_events()
        await first.die()
        endpoint.note_loss(first, LOST)
        second = MortalEngine()
        await endpoint.resume(second)
        while len(events) < 6:
            events += await endpoint.next_events()
        assert events == expected[3:]
        await second.die()

    asyncio.run(scenario())


def test_when_it_is_given_up_everybody_is_told_and_nobody_waits():
    async def scenario():
        first = MortalEngine()
        endpoint = JournaledEndpoint(first)
        await first.die()
        waiting = [
            asyncio.create_task(endpoint.add(make_request())),
            asyncio.create_task(endpoint.next_events()),
        ]
        assert await endpoint.loss is LOST
        endpoint.fail(PipelineError("gave up"))
        for call in (*waiting, endpoint.add(make_request("b"))):
            with pytest.raises(PipelineError, match=r"^gave up$"):
                await call
        await endpoint.abort("a")

    asyncio.run(scenario())


def test_a_refused_request_is_not_in_the_journal_and_an_id_in_use_is_refused():
    async def scenario():
        engine = MortalEngine(max_model_len=16)
        endpoint = JournaledEndpoint(engine)
        with pytest.raises(InvalidRequestError):
            await endpoint.add(make_request("a", max_tokens=100))
        await endpoint.add(make_request("a", max_tokens=5))
        with pytest.raises(InvalidRequestError, match="in use"):
            await endpoint.add(make_request("a"))
        events = await endpoint.next_events()
        assert events == expected_events(make_request("a", max_tokens=5))[: len(events)]
        await engine.die()

    asyncio.run(scenario())


def test_the_journal_keeps_order_and_tokens_and_forgets_what_ends():
    journal = Journal()
    for name in "abc":
        journal.open(OpenRequest(request=make_request(name)))
    journal.record([TokenEvent("b", 7), TokenEvent("x", 9)])
    journal.accept("a")
    assert not journal.is_pending("b"), "it has got a token, so an engine has it"
    assert journal.is_pending("c")
    journal.record([TokenEvent("b", 8), TokenEvent("a", 1, FinishReason.STOP)])
    journal.accept("a")
    assert journal.accepted() == [OpenRequest(request=make_request("b"), output_token_ids=(7, 8))]


def test_a_restored_request_is_not_refused_and_does_not_expire():
    scheduler = make_scheduler(queue=QueueLimits(max_requests=1, timeout_s=1.0))
    scheduler.add(make_request("a"))
    with pytest.raises(OverloadedError):
        scheduler.add(make_request("b"))
    for name in "bc":
        scheduler.restore(
            OpenRequest(request=make_request(name, queue_timeout_s=1.0), output_token_ids=(100,))
        )
    assert [event.request_id for event in scheduler.expire(now_s=100.0)] == ["a"]
    assert scheduler.load().num_waiting_tokens == 2 * 9


def test_a_restored_request_that_can_never_be_served_here_is_refused_and_leaves_nothing():
    scheduler = make_scheduler(num_blocks=4)
    too_long = make_request("a", max_tokens=100)
    with pytest.raises(InvalidRequestError, match="the limit is"):
        scheduler.restore(OpenRequest(request=too_long, output_token_ids=(1,)))
    assert scheduler.is_idle
    assert scheduler.num_requests == 0


def test_a_restored_request_keeps_its_priority_and_ends_after_the_tokens_it_asked_for():
    scheduler = make_scheduler()
    for name, priority in (("later", 1), ("first", 0)):
        request = make_request(name, max_tokens=2, priority=priority)
        scheduler.restore(OpenRequest(request=request, output_token_ids=(100,)))
    batch = scheduler.schedule()
    assert [scheduler.request_of(item.seq_id).request_id for item in batch.sequences] == [
        "first",
        "later",
    ]
    result = MicroBatchResult(batch_id=batch.batch_id, token_ids=(5, 6))
    ends = scheduler.commit(result)
    assert [(event.token_id, event.finish_reason) for event in ends] == [
        (5, FinishReason.LENGTH),
        (6, FinishReason.LENGTH),
    ]
