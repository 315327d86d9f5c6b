"""Sends the requests of a workload to an engine as they come, in real time."""

import asyncio
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from gllm_ray.engine.client import EngineClient
from gllm_ray.errors import PipelineError
from gllm_ray.messages import FinishReason, GenerationRequest
from gllm_ray.simulation.quantile_sketch import QuantileSketch
from gllm_ray.simulation.simulated_request import SimulatedRequest, to_generation_request


@dataclass(slots=True)
class Replay:
    """What clients saw.

    Attributes:
        wall_s: From the start of the workload to the end of its last request.
        ttft_s: From the arrival of each request to its first token.
        tpot_s: From its first token to its last, over the tokens after the first.
    """

    wall_s: float = 0.0
    ttft_s: QuantileSketch = field(default_factory=QuantileSketch)
    tpot_s: QuantileSketch = field(default_factory=QuantileSketch)


async def replay(
    client: EngineClient, requests: Iterable[SimulatedRequest], *, cache_salt: str
) -> Replay:
    """Let all requests come and end.

    A request that is sent late, because this process was busy, counts from when it was to come.

    Args:
        client: Of an engine that holds no requests.
        requests: Those without `max_tokens`, whose outputs have a known length.
        cache_salt: Differs from that of all replays before, whose prompts may be the same.

    Raises:
        PipelineError: A request did not get all of its tokens.
        InvalidRequestError: A request is too long for the engine.
    """
    result = Replay()
    start_s = asyncio.get_running_loop().time()
    async with asyncio.TaskGroup() as tasks:
        for index, request in enumerate(requests):
            generation = replace(to_generation_request(request, index), cache_salt=cache_salt)
            arrival_s = start_s + request.arrival_s
            tasks.create_task(_send(client, generation, arrival_s, result))
    result.wall_s = asyncio.get_running_loop().time() - start_s
    return result


async def _send(
    client: EngineClient, request: GenerationRequest, arrival_s: float, result: Replay
) -> None:
    loop = asyncio.get_running_loop()
    await asyncio.sleep(arrival_s - loop.time())
    first_s, reason = None, None
    async for events in client.generate(request):
        first_s = loop.time() if first_s is None else first_s
        reason = events[-1].finish_reason
    last_s = loop.time()
    if first_s is None or reason is not FinishReason.LENGTH:
        raise PipelineError(
            f"request {request.request_id} ended with {reason}; must end with length"
        )
    result.ttft_s.add(first_s - arrival_s)
    if request.max_tokens > 1:
        result.tpot_s.add((last_s - first_s) / (request.max_tokens - 1))
