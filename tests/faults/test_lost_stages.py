"""A stage process dies or stands still while requests run."""

import asyncio
import logging
import time

import pytest

from tests.faults.replicas import make_config, make_request, make_requests, running
from tests.ray.test_ray_pipeline import stage_processes

NUM_STAGES = 3


@pytest.fixture(scope="module")
def loop():
    with asyncio.Runner() as runner:
        yield runner


@pytest.fixture(scope="module")
def pipeline(ray_cluster, loop):
    """One replica for all tests here: each test leaves it repaired."""
    context = running(make_config(NUM_STAGES, heartbeat_timeout_s=2))
    yield loop.run(context.__aenter__())
    loop.run(context.__aexit__(None, None, None))


@pytest.fixture(scope="module")
def undisturbed(pipeline, loop):
    """What each request gets when nothing breaks."""
    answers = loop.run(pipeline.collect_all(make_requests()))
    return {events[0].request_id: events for events in answers}


def logged(caplog, start):
    return [r.getMessage() for r in caplog.records if r.getMessage().startswith(start)]


@pytest.mark.parametrize("moment", ["prefill", "decode"])
@pytest.mark.parametrize("stage_id", range(NUM_STAGES))
def test_a_killed_stage_is_replaced_alone_and_no_token_is_lost_repeated_or_changed(
    pipeline, undisturbed, loop, caplog, stage_id, moment
):
    caplog.set_level(logging.INFO, "gllm_ray")

    async def scenario():
        before = await pipeline.pids()
        decoding = asyncio.Event()
        tasks = [
            asyncio.create_task(pipeline.collect(r, lambda n: n >= 5 and decoding.set()))
            for r in make_requests()
        ]
        if moment == "prefill":
            await pipeline.until_busy(1)
        else:
            await decoding.wait()
        await pipeline.harm(stage_id)
        killed = time.monotonic()
        while not logged(caplog, "the pipeline stands still"):
            await asyncio.sleep(0.005)
        detected_s = time.monotonic() - killed
        await pipeline.replica.check_health()
        late = asyncio.create_task(pipeline.collect(make_request("late", max_tokens=5)))
        answers = await asyncio.gather(*tasks)
        assert len(await late) == 5
        load = await pipeline.until_idle()
        return before, answers, detected_s, load

    before, answers, detected_s, load = loop.run(scenario())
    assert {events[0].request_id: events for events in answers} == undisturbed
    assert detected_s < 2
    after = loop.run(pipeline.pids())
    assert [old != new for old, new in zip(before, after, strict=True)] == [
        i == stage_id for i in range(NUM_STAGES)
    ]
    assert stage_processes() == set(after)
    assert load.kv_utilization == 0
    (cause,) = logged(caplog, "the pipeline stands still")
    assert f"stage {stage_id} (layers" in cause
    assert "died" in cause
    (recovered,) = logged(caplog, "recovered")
    assert all(word in recovered for word in ("detect", "restart", "reload", "reconnect"))
