"""The scheduler's process dies, alone or with a stage."""

import asyncio
import os
import signal

import pytest

from gllm_ray.assembly.remote_scheduler import RemoteScheduler
from gllm_ray.errors import PipelineError
from tests.faults.replicas import (
    CAUSE,
    HEARTBEAT_TIMEOUT_S,
    RECOVERED,
    logged,
    make_config,
    make_request,
    make_requests,
    running,
    until,
)
from tests.ray.test_ray_pipeline import stage_processes

# More than the KV cache has room for, so that the last ones wait.
LONG = [make_request(f"long {n}", num_tokens=800, max_tokens=20) for n in "abcdefgh"]


def kill_scheduler():
    (pid,) = stage_processes("SchedulerActor")
    os.kill(pid, signal.SIGKILL)
    return pid


async def until_recovered(caplog):
    await until(lambda: any("new scheduler" in line for line in logged(caplog, RECOVERED)), 30)


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("queued", marks=pytest.mark.short_with("refs")),
        pytest.param("prefill", marks=pytest.mark.chaos),
        pytest.param("decode", marks=pytest.mark.short_with("direct")),
    ],
)
def test_no_token_is_lost_repeated_or_changed_when_the_scheduler_dies(
    pipeline, loop, caplog, moment
):
    requests = LONG if moment == "queued" else make_requests()

    async def scenario():
        undisturbed = await pipeline.collect_all(requests)
        stages = await pipeline.pids()
        decoding = asyncio.Event()
        tasks = [
            asyncio.create_task(pipeline.collect(r, lambda n: n >= 5 and decoding.set()))
            for r in requests
        ]
        if moment == "decode":
            await decoding.wait()
        else:
            await pipeline.until_busy(len(requests))
        if moment == "queued":
            assert (await pipeline.replica.load()).num_waiting_requests
        killed = kill_scheduler()
        assert await until(lambda: logged(caplog, CAUSE)) < 2
        await pipeline.replica.check_health()
        late = asyncio.create_task(pipeline.collect(make_request("late", max_tokens=5)))
        given_up = pipeline.client.generate(make_request("given up"))
        waiting = asyncio.create_task(anext(given_up))
        await asyncio.sleep(0)
        waiting.cancel()
        assert await asyncio.gather(*tasks) == undisturbed
        assert len(await late) == 5
        load = await pipeline.replica.load()
        assert (load.num_requests, load.kv_utilization) == (0, 0)
        assert await pipeline.pids() == stages
        return killed

    killed = loop.run(scenario())
    (scheduler,) = stage_processes("SchedulerActor")
    assert scheduler != killed
    (cause,) = logged(caplog, CAUSE)
    assert "the scheduler was lost: " in cause
    (recovered,) = logged(caplog, RECOVERED)
    assert all(part in recovered for part in ("new scheduler", "reconnect", "restart", "resume"))


@pytest.mark.short_with("direct")
def test_a_scheduler_that_stands_still_is_replaced_after_its_deadline(pipeline, loop, caplog):
    async def scenario():
        undisturbed = await pipeline.collect_all(make_requests())
        decoding = asyncio.Event()
        tasks = [
            asyncio.create_task(pipeline.collect(r, lambda n: n >= 5 and decoding.set()))
            for r in make_requests()
        ]
        await decoding.wait()
        (hanging,) = stage_processes("SchedulerActor")
        os.kill(hanging, signal.SIGSTOP)
        seconds = await until(lambda: logged(caplog, CAUSE), HEARTBEAT_TIMEOUT_S + 5)
        assert seconds > HEARTBEAT_TIMEOUT_S
        assert await asyncio.gather(*tasks) == undisturbed
        await until(lambda: hanging not in stage_processes("SchedulerActor"), 20)

    loop.run(scenario())
    (cause,) = logged(caplog, CAUSE)
    assert "the scheduler hangs: it has not answered" in cause


def test_a_scheduler_that_stands_still_as_it_takes_over_is_replaced_after_its_deadline(
    ray_cluster, caplog, monkeypatch
):
    hanging = set()
    restore = RemoteScheduler.restore

    async def restore_by_another(scheduler, requests):
        if not hanging:
            hanging.update(stage_processes("SchedulerActor") - known)
            for pid in hanging:
                os.kill(pid, signal.SIGSTOP)
        await restore(scheduler, requests)

    async def scenario():
        others = stage_processes("SchedulerActor")
        async with running(make_config(1, restart_timeout_s=15)) as pipeline:
            undisturbed = await pipeline.collect_all(make_requests())
            streams = [asyncio.create_task(pipeline.collect(r)) for r in make_requests()]
            await pipeline.until_busy(len(streams))
            known.update(stage_processes("SchedulerActor"))
            monkeypatch.setattr(RemoteScheduler, "restore", restore_by_another)
            (first,) = known - others
            os.kill(first, signal.SIGKILL)
            async with asyncio.timeout(60):
                assert await asyncio.gather(*streams) == undisturbed
            await until(lambda: not hanging & stage_processes("SchedulerActor"), 20)

    known = set()
    asyncio.run(scenario())
    assert hanging
    (recovered,) = logged(caplog, RECOVERED)
    assert "new scheduler" in recovered


@pytest.mark.short_with("refs")
@pytest.mark.parametrize("is_stage_first", [pytest.param(True, marks=pytest.mark.chaos), False])
def test_a_stage_and_the_scheduler_die_together(pipeline, loop, caplog, is_stage_first):
    async def scenario():
        undisturbed = await pipeline.collect_all(make_requests())
        before = await pipeline.pids()
        decoding = asyncio.Event()
        tasks = [
            asyncio.create_task(pipeline.collect(r, lambda n: n >= 5 and decoding.set()))
            for r in make_requests()
        ]
        await decoding.wait()
        await pipeline.harm(1)
        if is_stage_first:
            await until(lambda: logged(caplog, CAUSE))
        kill_scheduler()
        assert await asyncio.gather(*tasks) == undisturbed
        await until_recovered(caplog)
        after = await pipeline.pids()
        assert [new == old for new, old in zip(after, before, strict=True)] == [True, False, True]
        load = await pipeline.replica.load()
        assert (load.num_requests, load.kv_utilization) == (0, 0)

    loop.run(scenario())


@pytest.mark.chaos
def test_a_scheduler_that_dies_again_and_again_ends_every_request_with_the_first_cause(
    ray_cluster, caplog
):
    async def kill_new_schedulers(spared):
        while True:
            for pid in stage_processes("SchedulerActor") - spared:
                os.kill(pid, signal.SIGKILL)
            await asyncio.sleep(0.02)

    async def scenario():
        others = stage_processes("SchedulerActor")
        async with running(make_config(1, max_attempts=1)) as pipeline:
            streams = [
                asyncio.create_task(pipeline.collect(make_request(n, max_tokens=400))) for n in "ab"
            ]
            await pipeline.until_busy(2)
            killer = asyncio.create_task(kill_new_schedulers(others))
            ends = await asyncio.gather(*streams, return_exceptions=True)
            killer.cancel()
            for refused in (pipeline.replica.check_health(), pipeline.replica.load()):
                with pytest.raises(PipelineError, match=r"^gave up after 2 faults in a row"):
                    await refused
            return ends

    for end in asyncio.run(scenario()):
        assert isinstance(end, PipelineError)
        assert "the first: the scheduler was lost: " in str(end)
    assert len(logged(caplog, CAUSE)) == 1
    assert not logged(caplog, RECOVERED)
