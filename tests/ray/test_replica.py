"""A whole replica on a cluster: stages, scheduler actor, and a client of it."""

import asyncio
import os
import signal
import time

import pytest

from gllm_ray.assembly.replica import PipelineReplica
from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import InvalidRequestError, PipelineError, StageLostError
from gllm_ray.messages import FinishReason, GenerationRequest
from tests.pipelines import make_service_config
from tests.ray.test_ray_pipeline import stage_processes

NUM_REQUESTS = 8


async def collect(client, request):
    """Every event of a request, and the error that ended its stream."""
    events = []
    try:
        async for step in client.generate(request):
            events += step
    except PipelineError as error:
        return events, error
    return events, None


def requests_of(prompts, max_tokens):
    return [
        GenerationRequest(request_id=str(i), prompt_token_ids=tuple(prompt), max_tokens=max_tokens)
        for i, prompt in enumerate(prompts)
    ]


async def check_generation(client, reference):
    wanted = requests_of(reference.prompts, len(reference.outputs[0]))
    answers = await asyncio.gather(*(collect(client, request) for request in wanted))
    assert [[event.token_id for event in events] for events, _ in answers] == reference.outputs
    assert {events[-1].finish_reason for events, _ in answers} == {FinishReason.LENGTH}


async def check_refusal(client):
    (request,) = requests_of([[1, 2]], max_tokens=1000)
    with pytest.raises(InvalidRequestError) as caught:
        await anext(client.generate(request))
    assert caught.value.code == "context_length_exceeded"


async def check_loss_of_a_stage(client, replica):
    wanted = requests_of([[i + 1, i + 2] for i in range(NUM_REQUESTS)], max_tokens=120)
    streams = [asyncio.create_task(collect(client, request)) for request in wanted]
    while (await replica.load()).num_requests < NUM_REQUESTS:  # noqa: ASYNC110
        await asyncio.sleep(0.005)
    os.kill(await replica.group.stages[1].ping.remote(), signal.SIGKILL)
    killed = time.monotonic()
    for events, error in await asyncio.gather(*streams):
        ends = [event.error for event in events if event.finish_reason is not None]
        assert isinstance(error, StageLostError) or ends == [StageLostError.public_message]
    assert time.monotonic() - killed < 2
    with pytest.raises(PipelineError):
        await replica.check_health()
    with pytest.raises(PipelineError):
        await anext(client.generate(wanted[0]))


async def wait_until_gone(processes):
    deadline = time.monotonic() + 5
    while processes & stage_processes():
        assert time.monotonic() < deadline, "a stage outlived its replica"
        await asyncio.sleep(0.05)


def test_a_replica_serves_until_a_stage_dies_and_then_ends_every_request(
    ray_cluster, tiny_llama, reference
):
    async def scenario():
        others = stage_processes()
        config = make_service_config(tiny_llama, num_stages=2, cpus_per_stage=0.5)
        replica = await PipelineReplica.start(config)
        own = stage_processes() - others
        client = EngineClient(replica)
        await client.start()
        await replica.check_health()
        await check_generation(client, reference)
        await check_refusal(client)
        await check_loss_of_a_stage(client, replica)
        await client.close()
        await replica.close()
        await wait_until_gone(own)

    asyncio.run(scenario())
