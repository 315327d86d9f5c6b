"""Every process that may die, at every moment of a request's life."""

import asyncio
import itertools
import logging
import os
import signal

import pytest

from tests.faults.api import serving
from tests.faults.moments import MOMENTS, SCHEDULER, complete_all, reach
from tests.faults.replicas import CAUSE, RECOVERED, logged, make_config, until
from tests.ray.test_ray_pipeline import stage_processes

NUM_STAGES = 3
VICTIMS = {
    "first": "stage 0 (",
    "middle": "stage 1 (",
    "last": "stage 2 (",
    "scheduler": "the scheduler was lost",
}
IN_SHORT = {
    ("first", "prefill"),
    ("middle", "streaming"),
    ("last", "queued"),
    ("scheduler", "streaming"),
}


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def api(ray_cluster, loop):
    """One replica for all cells: each leaves it repaired."""
    context = serving(make_config(NUM_STAGES, scheduler=SCHEDULER, calm_s=0.01))
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def undisturbed(api, loop):
    """What the clients of each moment get when nothing breaks; computed when first asked for."""
    known = {}

    def answers(moment):
        if moment not in known:
            known[moment] = loop.run(complete_all(api[1], moment))
        return known[moment]

    return answers


async def kill(service, victim):
    if victim == "scheduler":
        (pid,) = stage_processes("SchedulerActor")
    else:
        pid = (await service.pids())[list(VICTIMS).index(victim)]
    os.kill(pid, signal.SIGKILL)
    return pid


def cells():
    return [
        pytest.param(*cell, marks=() if cell in IN_SHORT else pytest.mark.chaos)
        for cell in itertools.product(VICTIMS, MOMENTS)
    ]


@pytest.mark.parametrize(("victim", "moment"), cells())
def test_who_is_killed_costs_no_request_anything_but_time(
    api, undisturbed, loop, caplog, victim, moment
):
    service, http = api
    caplog.set_level(logging.INFO, "gllm_ray")

    async def scenario():
        before = set(await service.pids())
        answers = asyncio.create_task(complete_all(http, moment))
        await reach(http, moment)
        killed = await kill(service, victim)
        answers = await answers
        await until(lambda: logged(caplog, RECOVERED), 30)
        stages, (scheduler,) = set(await service.pids()), stage_processes("SchedulerActor")
        assert killed not in stages | {scheduler}
        assert len(before - stages) == (victim != "scheduler"), "only what died is replaced"
        return answers, await service.replica.load()

    expected = undisturbed(moment)
    caplog.clear()
    answers, load = loop.run(scenario())
    assert answers == expected
    assert (load.num_requests, load.kv_utilization) == (0, 0)
    (cause,) = logged(caplog, CAUSE)
    assert VICTIMS[victim] in cause
    assert len(logged(caplog, RECOVERED)) == 1
