"""Every process that may die, at every moment of a request's life."""

import asyncio
import itertools
import logging
import os
import signal

import pytest
from ray.util.placement_group import placement_group_table

from tests.faults.api import complete, serving
from tests.faults.replicas import CAUSE, RECOVERED, logged, make_config, make_request, until
from tests.ray.test_ray_pipeline import stage_processes

NUM_STAGES = 3
VICTIMS = {
    "first": "stage 0 (",
    "middle": "stage 1 (",
    "last": "stage 2 (",
    "scheduler": "the scheduler was lost",
}
MOMENTS = ("queued", "prefill", "decode", "streaming")
IN_SHORT = {
    ("first", "prefill"),
    ("middle", "streaming"),
    ("last", "queued"),
    ("scheduler", "streaming"),
}


def body_of(index, *, num_tokens=40, **options):
    """Greedy and seeded ones in turn."""
    sampling = {"temperature": 1.0, "seed": 17} if index % 2 else {"temperature": 0}
    prompt = [5 + (7 * index + 13 * i) % 900 for i in range(num_tokens)]
    return {"model": "demo", "prompt": prompt, "max_tokens": 40} | sampling | options


BODIES = {
    # More than the KV cache has room for, so that the last ones wait.
    "queued": [body_of(i, num_tokens=800, max_tokens=20) for i in range(8)],
    "prefill": [body_of(i, num_tokens=300) for i in range(4)],
    "decode": [body_of(i) for i in range(4)],
    "streaming": [body_of(i, stream=True) for i in range(4)],
}


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def api(ray_cluster, loop):
    """One replica for all cells: each leaves it repaired."""
    scheduler = {"prefix_caching": False}  # else only the first run of a prompt would prefill it
    context = serving(make_config(NUM_STAGES, scheduler=scheduler, calm_s=0.01))
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


async def complete_all(http, moment):
    return await asyncio.gather(*(complete(http, body) for body in BODIES[moment]))


async def reach(service, moment, num_requests):
    """Return when the requests have come so far."""
    await service.until_busy(num_requests)
    if moment == "queued":
        assert (await service.replica.load()).num_waiting_requests
    if moment in ("decode", "streaming"):
        witness = make_request("witness", max_tokens=5)  # it came last, and is served in turn
        assert len(await service.collect(witness)) == 5


async def kill(service, victim):
    if victim == "scheduler":
        (pid,) = stage_processes("SchedulerActor")
    else:
        pid = (await service.pids())[list(VICTIMS).index(victim)]
    os.kill(pid, signal.SIGKILL)
    return pid


def living_placement_groups():
    table = placement_group_table()
    return {name for name, group in table.items() if group["state"] != "REMOVED"}


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
        before, groups = set(await service.pids()), living_placement_groups()
        answers = asyncio.create_task(complete_all(http, moment))
        await reach(service, moment, len(BODIES[moment]))
        killed = await kill(service, victim)
        answers = await answers
        await until(lambda: logged(caplog, RECOVERED), 30)
        stages, (scheduler,) = set(await service.pids()), stage_processes("SchedulerActor")
        assert stage_processes() == stages, "a stage was left behind"
        assert living_placement_groups() == groups
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
