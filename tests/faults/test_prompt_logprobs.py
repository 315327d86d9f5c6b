"""What a model finds of prompts is told once, whoever dies before or after."""

import asyncio
import os
import signal

import pytest

from gllm_ray.model.prompt_logprobs import read_prompt_logprobs
from tests.faults.replicas import CAUSE, RECOVERED, logged, make_request, until
from tests.ray.test_ray_pipeline import stage_processes

NUM_TOKENS = 600
REQUESTS = [
    make_request(f"scored {n}", num_tokens=NUM_TOKENS, max_tokens=20, num_prompt_logprobs=2)
    for n in "abcd"
]


async def kill(pipeline, victim):
    if victim == "last stage":
        await pipeline.harm(2)
    else:
        (pid,) = stage_processes("SchedulerActor")
        os.kill(pid, signal.SIGKILL)


async def collect_disturbed(pipeline, victim, moment):
    """The events of the requests, while something dies in the midst of their prompts or outputs."""
    num_events = dict.fromkeys(REQUESTS, 0)
    tasks = [
        asyncio.create_task(
            pipeline.collect(request, lambda n, r=request: num_events.update({r: n}))
        )
        for request in REQUESTS
    ]
    if moment == "prefill":
        await pipeline.until_busy(len(REQUESTS))
        total = NUM_TOKENS * len(REQUESTS)
        while (await pipeline.replica.load()).num_waiting_tokens in (0, total):  # noqa: ASYNC110
            await asyncio.sleep(0)
        assert not any(num_events.values())
    else:
        await until(lambda: all(num >= 3 for num in num_events.values()))
    await kill(pipeline, victim)
    return await asyncio.gather(*tasks)


def check(disturbed, undisturbed):
    for events, expected in zip(disturbed, undisturbed, strict=True):
        assert [event.token_id for event in events] == [event.token_id for event in expected]
        told = [event.prompt_logprobs for event in events]
        assert told[1:] == [None] * (len(events) - 1)
        scores, wanted = (
            read_prompt_logprobs(first.prompt_logprobs, NUM_TOKENS - 1)
            for first in (events[0], expected[0])
        )
        logprobs = [score.logprob for score in scores]
        assert logprobs == pytest.approx([score.logprob for score in wanted], abs=1e-3)


@pytest.mark.parametrize(
    ("victim", "moment"),
    [
        pytest.param("last stage", "prefill", marks=pytest.mark.short_with("refs")),
        pytest.param("last stage", "decode", marks=pytest.mark.chaos),
        pytest.param("scheduler", "prefill", marks=pytest.mark.chaos),
        pytest.param("scheduler", "decode", marks=pytest.mark.short_with("direct")),
    ],
)
def test_every_prompt_is_told_of_once(pipeline, loop, caplog, victim, moment):
    async def scenario():
        undisturbed = await pipeline.collect_all(REQUESTS)
        disturbed = await collect_disturbed(pipeline, victim, moment)
        await until(lambda: logged(caplog, RECOVERED), 30)
        return disturbed, undisturbed

    check(*loop.run(scenario()))
    assert len(logged(caplog, CAUSE)) == 1
