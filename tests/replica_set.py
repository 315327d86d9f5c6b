"""Replicas in a row, real engines over a pipeline of the test's choice, that end in many ways."""

import asyncio
from contextlib import aclosing
from dataclasses import dataclass

from gllm_ray.engine.client import EngineClient
from gllm_ray.engine.engine import Engine
from gllm_ray.errors import PipelineError
from tests.factories import make_scheduler

LOST = PipelineError("a replica was lost: killed")
HEALTHY = 10**9


@dataclass(frozen=True)
class Fault:
    """How a replica ends.

    Attributes:
        after: Lists of events that it gives before; the first has none.
        kind: The process dies; or its pipeline breaks, which an event tells; or the stream ends.
        results: Those of the pipeline before it breaks.
    """

    after: int = HEALTHY
    kind: str = "dies"
    results: int = HEALTHY


class BreakingPipeline:
    """A pipeline that breaks after some results."""

    def __init__(self, pipeline, num_results):
        self._pipeline = pipeline
        self._num_results = num_results

    def submit(self, batch):
        self._pipeline.submit(batch)

    async def next_result(self):
        self._num_results -= 1
        if self._num_results < 0:
            raise LOST
        return await self._pipeline.next_result()

    async def close(self):
        await self._pipeline.close()


class Replicas:
    """A `ReplicaSet`: each attempt is made on the next engine, the last of which has no fault.

    Attributes:
        schedulers: Those of the engines.
        outputs: What each attempt was to go on with.
    """

    def __init__(self, make_pipeline, faults=(), **options):
        self.schedulers = []
        self.outputs = []
        self._engines = []
        self._clients = []
        for fault in (*faults, Fault()):
            self.schedulers.append(make_scheduler(**options))
            pipeline = BreakingPipeline(make_pipeline(), fault.results)
            self._engines.append(Engine(self.schedulers[-1], pipeline))
            self._clients.append(EngineClient(self._engines[-1]))
        self._faults = [*faults, Fault()]

    async def __aenter__(self):
        for engine, client in zip(self._engines, self._clients, strict=True):
            engine.start()
            await client.start()
        return self

    async def __aexit__(self, *_exc_info):
        for engine, client in zip(self._engines, self._clients, strict=True):
            await client.close()
            await engine.close()

    async def run(self, request, output_token_ids):
        number = min(len(self.outputs), len(self._faults) - 1)
        self.outputs.append(output_token_ids)
        fault = self._faults[number]
        steps = self._clients[number].generate(request, output_token_ids, tells_acceptance=True)
        async with aclosing(steps):
            for _ in range(fault.after):
                step = await anext(steps, None)
                if step is None:
                    return
                yield step
        if fault.kind == "dies":
            raise LOST

    async def until_idle(self, number=-1):
        async with asyncio.timeout(5):
            while not self.schedulers[number].is_idle:  # noqa: ASYNC110
                await asyncio.sleep(0)
        return self.schedulers[number].kv_utilization
