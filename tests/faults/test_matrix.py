"""Every process that may die, at every moment of a request's life."""

import asyncio
import itertools
import json
import os
import signal

import jsonschema
import pytest

from tests.faults.moments import MOMENTS, SCHEMA, complete_all, reach
from tests.faults.replicas import CAUSE, RECOVERED, logged, until
from tests.ray.test_ray_pipeline import stage_processes

VICTIMS = {
    "first": "stage 0 (",
    "middle": "stage 1 (",
    "last": "stage 2 (",
    "scheduler": "the scheduler was lost",
}
# With one control plane each.
IN_SHORT = {
    ("first", "prefill"): "refs",
    ("middle", "structured"): "direct",
    ("last", "queued"): "refs",
    ("scheduler", "streaming"): "direct",
}


async def kill(service, victim):
    if victim == "scheduler":
        (pid,) = stage_processes("SchedulerActor")
    else:
        pid = (await service.pids())[list(VICTIMS).index(victim)]
    os.kill(pid, signal.SIGKILL)
    return pid


def check_structure(answers):
    for text, usage, scored in answers:
        jsonschema.validate(json.loads(text), SCHEMA)
        assert len(scored) == usage["completion_tokens"]


def cells():
    return [
        pytest.param(
            *cell,
            marks=pytest.mark.short_with(IN_SHORT[cell]) if cell in IN_SHORT else pytest.mark.chaos,
        )
        for cell in itertools.product(VICTIMS, MOMENTS)
    ]


@pytest.mark.parametrize(("victim", "moment"), cells())
def test_who_is_killed_costs_no_request_anything_but_time(api, loop, caplog, victim, moment):
    (service, http), salt = api, list(VICTIMS).index(victim)

    async def scenario():
        before = set(await service.pids())
        answers = asyncio.create_task(complete_all(http, moment, salt))
        await reach(http, moment, salt)
        killed = await kill(service, victim)
        answers = await answers
        await until(lambda: logged(caplog, RECOVERED), 30)
        stages, (scheduler,) = set(await service.pids()), stage_processes("SchedulerActor")
        assert killed not in stages | {scheduler}
        assert len(before - stages) == (victim != "scheduler"), "only what died is replaced"
        load = await service.replica.load()
        # Later, because what is computed once is found in the prefix cache.
        return answers, await complete_all(http, moment, salt), load

    answers, expected, load = loop.run(scenario())
    assert answers == expected
    if moment == "structured":
        check_structure(answers)
    assert (load.num_requests, load.kv_utilization) == (0, 0)
    (cause,) = logged(caplog, CAUSE)
    assert VICTIMS[victim] in cause
    assert len(logged(caplog, RECOVERED)) == 1
