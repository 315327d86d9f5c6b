"""The real engine in virtual time: an event loop whose clock jumps, and stages of a cost model."""

import asyncio
import contextlib
from collections import Counter, deque
from itertools import groupby
from random import Random
from selectors import DefaultSelector

from gllm_ray.config import RecoveryConfig
from gllm_ray.engine.engine import Engine
from gllm_ray.engine.supervisor import Supervisor
from gllm_ray.errors import GllmRayError, StageLostError
from gllm_ray.messages import MicroBatchResult
from gllm_ray.simulation.metrics import PipelineMetrics
from gllm_ray.simulation.simulated_request import output_token_id, to_generation_request
from gllm_ray.simulation.virtual_pipeline import VirtualPipeline


class JumpingSelector(DefaultSelector):
    """Instead of waiting for a timer, lets the clock jump to it."""

    loop = None

    def select(self, timeout=None):
        assert timeout is not None, "nothing will ever happen"
        if timeout > 0:
            self.loop.now_s = self.loop._scheduled[0].when()
        return super().select(0)


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Its clock stands still while anything can run."""

    def __init__(self):
        selector = JumpingSelector()
        selector.loop = self
        self.now_s = 0.0
        super().__init__(selector)

    def time(self):
        return self.now_s


async def sleep_until(time_s):
    loop = asyncio.get_running_loop()
    if time_s > loop.time():
        woken = loop.create_future()
        loop.call_at(time_s, woken.set_result, None)
        await woken


class VirtualTimePipeline:
    """A pipeline for the engine whose stages are simulated, and die when the deployment says so.

    Attributes:
        submitted: Every micro-batch.
    """

    def __init__(self, deployment, scheduler, requests, seed):
        self.submitted = []
        self._scheduler = scheduler
        self._requests = requests
        self._num_sampled = Counter()
        self._on_the_way = deque()
        self._losses = deque(deployment.losses)
        self._stages = VirtualPipeline(
            deployment.cost,
            deployment.timing,
            PipelineMetrics(deployment.cost.layout.num_stages),
            Random(f"{seed} jitter 0"),
        )

    def submit(self, batch):
        now_s = asyncio.get_running_loop().time()
        load = self._scheduler.latest_load
        passage = self._stages.submit(batch.batch_id, load, now_s, batch.continues)
        self._on_the_way.append((batch, *passage))
        self.submitted.append(batch)

    async def next_result(self):
        batch, result_s, stage_times = self._on_the_way.popleft()
        await sleep_until(result_s)
        token_ids = tuple(
            self._sample(item.seq_id) for item in batch.sequences if item.sampling is not None
        )
        return MicroBatchResult(
            batch_id=batch.batch_id, token_ids=token_ids, stage_times=stage_times
        )

    def _sample(self, seq_id):
        index = int(self._scheduler.request_of(seq_id).request_id)
        self._num_sampled[index] += 1
        return output_token_id(self._requests[index], self._num_sampled[index] - 1)

    async def watch(self):
        if not self._losses:
            await asyncio.Event().wait()
        await sleep_until(self._losses[0].time_s)
        raise StageLostError("a stage was lost")

    async def repair(self):
        self._on_the_way.clear()
        self._stages.restart(asyncio.get_running_loop().time())
        await asyncio.sleep(self._losses.popleft().recovery_s)

    async def close(self):
        pass


def run_engine(deployment, requests, seed):
    """Serve requests by the real engine.

    Returns:
        Its micro-batches, and how many requests ended, by how they ended.
    """
    scheduler = deployment.make_scheduler()
    pipeline = VirtualTimePipeline(deployment, scheduler, requests, seed)
    ends = Counter()

    async def read(engine):
        while True:
            for event in await engine.next_events():
                if event.finish_reason is not None:
                    ends[event.finish_reason] += 1

    async def scenario():
        engine = Engine(scheduler, pipeline, Supervisor(pipeline, RecoveryConfig(backoff_s=0)))
        engine.start()
        reader = asyncio.create_task(read(engine))
        num_refused = 0
        indexed = list(enumerate(requests))
        for arrival_s, group in groupby(indexed, key=lambda pair: pair[1].arrival_s):
            await sleep_until(arrival_s)
            for index, request in group:
                try:
                    await engine.add(to_generation_request(request, index))
                except GllmRayError:
                    num_refused += 1
        while ends.total() + num_refused < len(requests):  # noqa: ASYNC110 - virtual time
            await asyncio.sleep(1.0)
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await reader
        await engine.close()

    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        runner.run(scenario())
    return pipeline.submitted, ends
