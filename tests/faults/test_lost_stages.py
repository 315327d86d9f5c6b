"""A stage process dies or stands still."""

import asyncio
import os
import signal
import time

import pytest

from gllm_ray.stages import heartbeat, repair
from gllm_ray.stages.stage_group import connect_stages
from gllm_ray.stages.transport import ProcessGroupChannel
from tests.faults.replicas import (
    CAUSE,
    HEARTBEAT_TIMEOUT_S,
    NUM_STAGES,
    RECOVERED,
    logged,
    make_request,
    make_requests,
    until,
)
from tests.ray.test_ray_pipeline import beside_steps, stage_processes


@pytest.fixture(scope="module")
def undisturbed(pipeline, loop):
    """What each request gets when nothing breaks."""
    return by_request(loop.run(pipeline.collect_all(make_requests())))


def by_request(answers):
    return {events[0].request_id: events for events in answers}


async def start_requests(pipeline):
    """Tasks of the requests, one of which is in decode."""
    decoding = asyncio.Event()
    tasks = [
        asyncio.create_task(pipeline.collect(r, lambda n: n >= 5 and decoding.set()))
        for r in make_requests()
    ]
    await decoding.wait()
    return tasks


def check_replaced(before, after, *stage_ids):
    replaced = [i for i in range(NUM_STAGES) if before[i] != after[i]]
    assert replaced == list(stage_ids)


def test_a_killed_stage_is_noticed_at_once_and_meanwhile_the_service_is_healthy(
    pipeline, undisturbed, loop, caplog
):
    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        await pipeline.harm(2)
        assert await until(lambda: logged(caplog, CAUSE)) < 2
        await pipeline.replica.check_health()
        late = asyncio.create_task(pipeline.collect(make_request("late", max_tokens=5)))
        answers = await asyncio.gather(*tasks)
        assert len(await late) == 5
        check_replaced(before, await pipeline.pids(), 2)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    (cause,) = logged(caplog, CAUSE)
    assert "stage 2 (layers" in cause
    assert "died" in cause
    (recovered,) = logged(caplog, RECOVERED)
    assert "stage 2 (layers" in recovered
    assert all(part in recovered for part in ("detect", "restart", "reload", "reconnect"))


@pytest.mark.chaos
def test_a_stage_that_ends_by_itself_is_replaced_as_one_that_is_killed(
    pipeline, undisturbed, loop, caplog
):
    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        beside_steps(pipeline.replica.group.stages[1].__ray_call__).remote(lambda _: os._exit(1))
        answers = await asyncio.gather(*tasks)
        check_replaced(before, await pipeline.pids(), 1)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    (cause,) = logged(caplog, CAUSE)
    assert "stage 1 (layers" in cause


@pytest.mark.chaos
def test_a_stage_that_dies_while_another_is_being_replaced_is_replaced_too(
    pipeline, undisturbed, loop, caplog
):
    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        await pipeline.harm(0)
        await until(lambda: logged(caplog, CAUSE))
        os.kill(before[2], signal.SIGKILL)
        answers = await asyncio.gather(*tasks)
        check_replaced(before, await pipeline.pids(), 0, 2)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    assert len(logged(caplog, CAUSE)) == 1
    (another,) = logged(caplog, "another stage broke during the repair: ")
    assert "stage 2 (layers" in another
    (recovered,) = logged(caplog, RECOVERED)
    assert "stage 0 (layers" in recovered
    assert "stage 2 (layers" in recovered


@pytest.mark.chaos
def test_a_new_stage_is_kept_when_connecting_fails_because_of_another(
    pipeline, undisturbed, loop, caplog, monkeypatch
):
    connected = []

    async def kill_stage_0_and_connect(group):
        pids = await asyncio.gather(*(stage.ping.remote() for stage in group.stages))
        connected.append(pids)
        if len(connected) == 1:
            os.kill(pids[0], signal.SIGKILL)
        return await connect_stages(group)

    monkeypatch.setattr(repair, "connect_stages", kill_stage_0_and_connect)

    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        await pipeline.harm(1)
        answers = await asyncio.gather(*tasks)
        check_replaced(before, await pipeline.pids(), 0, 1)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    first, second = connected
    assert second[1:] == first[1:]
    assert len(logged(caplog, RECOVERED)) == 1


@pytest.mark.chaos
def test_a_stage_that_cannot_connect_is_replaced_and_no_neighbour_that_waits_for_it(
    pipeline, undisturbed, loop, caplog
):
    def refuse_to_join(actor):
        def join(*_):
            raise RuntimeError("no memory for buffers")

        actor._stage._join = join

    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        await beside_steps(pipeline.replica.group.stages[2].__ray_call__).remote(refuse_to_join)
        await pipeline.harm(0)
        answers = await asyncio.gather(*tasks)
        check_replaced(before, await pipeline.pids(), 0, 2)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    (failed,) = logged(caplog, "the repair failed: ")
    assert "stage 2 failed to connect to its neighbours: RuntimeError: no memory" in failed


@pytest.mark.chaos
def test_a_stage_that_hangs_while_it_connects_is_replaced(
    pipeline, undisturbed, loop, caplog, monkeypatch
):
    for module in (heartbeat, repair):
        monkeypatch.setattr(module, "CONNECT_TIMEOUT_S", 3)

    def hang_in_probes(_):
        ProcessGroupChannel.probe = lambda _: time.sleep(3600)

    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        await beside_steps(pipeline.replica.group.stages[2].__ray_call__).remote(hang_in_probes)
        await pipeline.harm(0)
        async with asyncio.timeout(60):
            answers = await asyncio.gather(*tasks)
        check_replaced(before, await pipeline.pids(), 0, 2)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    assert "stage 2 (layers 6-7" in caplog.text
    assert "hangs: joining its edges takes" in caplog.text


@pytest.mark.chaos
def test_a_stage_that_takes_no_call_is_found_when_the_stages_are_connected(
    pipeline, undisturbed, loop, caplog
):
    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        pipeline.replica.group.stages[1].__ray_call__.remote(lambda _: time.sleep(3600))
        await pipeline.harm(2)
        answers = await asyncio.gather(*tasks)
        check_replaced(before, await pipeline.pids(), 1, 2)
        return answers

    start_s = time.monotonic()
    assert by_request(loop.run(scenario())) == undisturbed
    assert time.monotonic() - start_s < 30, "before a neighbour's patience ends"
    assert len(logged(caplog, CAUSE)) == 1


@pytest.mark.short_with("direct")
def test_a_stage_that_stands_still_is_replaced_after_its_deadline(
    pipeline, undisturbed, loop, caplog
):
    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        await pipeline.harm(1, signal.SIGSTOP)
        seconds = await until(lambda: logged(caplog, CAUSE), HEARTBEAT_TIMEOUT_S + 5)
        assert seconds > HEARTBEAT_TIMEOUT_S
        answers = await asyncio.gather(*tasks)
        await until(lambda: before[1] not in stage_processes(), 20)
        check_replaced(before, await pipeline.pids(), 1)
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    (cause,) = logged(caplog, CAUSE)
    assert "stage 1 (layers" in cause
    assert "hangs: it has not answered" in cause


@pytest.mark.short_with("refs")
def test_a_stage_that_is_slow_is_not_dead(pipeline, undisturbed, loop, caplog):
    async def scenario():
        before = await pipeline.pids()
        tasks = await start_requests(pipeline)
        pid = await pipeline.harm(1, signal.SIGSTOP)
        await asyncio.sleep(1.5)
        os.kill(pid, signal.SIGCONT)
        answers = await asyncio.gather(*tasks)
        assert await pipeline.pids() == before
        return answers

    assert by_request(loop.run(scenario())) == undisturbed
    assert not logged(caplog, CAUSE)


@pytest.mark.short_with("refs")
def test_a_stage_that_dies_while_nothing_runs_is_replaced_before_anybody_asks(
    pipeline, loop, caplog
):
    async def scenario():
        before = await pipeline.pids()
        await pipeline.harm(0)
        assert await until(lambda: logged(caplog, CAUSE)) < 2
        await until(lambda: logged(caplog, RECOVERED), 30)
        check_replaced(before, await pipeline.pids(), 0)
        assert len(await pipeline.collect(make_request("next", max_tokens=3))) == 3

    loop.run(scenario())
