"""Who sent requests and died is found, and its requests end."""

import asyncio

import pytest
from ray.exceptions import ActorDiedError, ActorUnavailableError

from gllm_ray.serving import callers
from gllm_ray.serving.callers import CallerWatch
from tests.serving.local_api import wait_until


class Caller:
    """What a watch asks of an actor handle."""

    def __init__(self):
        self.error = None
        self.num_questions = 0
        self.__ray_ready__ = self

    async def remote(self):
        self.num_questions += 1
        if self.error is not None:
            raise self.error


@pytest.fixture(autouse=True)
def short_period(monkeypatch):
    monkeypatch.setattr(callers, "_PERIOD_S", 0.005)


def test_the_open_requests_of_a_dead_caller_are_aborted_and_no_others():
    async def scenario():
        aborted = []
        ended = asyncio.Event()

        async def abort(request_id):
            aborted.append(request_id)
            ended.set()

        async def hold(caller, request_id):
            with watch.note(caller, request_id):
                await ended.wait()

        watch = CallerWatch(abort)
        dead, alive = Caller(), Caller()
        with watch.note(dead, "ended before"):
            pass
        calls = [hold(dead, "a"), hold(dead, "b"), hold(alive, "c")]
        tasks = [asyncio.create_task(call) for call in calls]
        dead.error = ActorUnavailableError("not now", None)
        await wait_until(lambda: dead.num_questions > 2)
        assert aborted == [], "it may be back"
        dead.error = ActorDiedError()
        await asyncio.gather(*tasks)
        await wait_until(lambda: len(aborted) == 2)
        assert sorted(aborted) == ["a", "b"]

    asyncio.run(scenario())


def test_who_has_no_request_is_not_asked_and_may_come_back():
    async def scenario():
        aborted = []

        async def abort(request_id):
            aborted.append(request_id)

        watch, caller = CallerWatch(abort), Caller()
        for _ in range(2):
            with watch.note(caller, "a"):
                asked = caller.num_questions
                await wait_until(lambda asked=asked: caller.num_questions > asked)
            await asyncio.sleep(0.02)
            asked = caller.num_questions
            await asyncio.sleep(0.02)
            assert caller.num_questions == asked
        assert aborted == []

    asyncio.run(scenario())
